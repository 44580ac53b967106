"""Check a bundle: hashes, contents, processor, and its golden pictures."""

from __future__ import annotations

from pathlib import Path

import click

from vitedge.cli._output import emit_json, json_option, say


@click.command(name="verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--no-run", is_flag=True, help="Check the files only; do not run the golden pictures.")
@json_option
def command(bundle: Path, no_run: bool, as_json: bool) -> None:
    """Check BUNDLE on the device it is for, and run its golden pictures in its runtime.

    Unknown, missing or changed files, names that climb out, links and oversize members are refused.

    \b
    vitedge verify deit_tiny_int8-cpu.zip
    """
    from dataclasses import asdict

    from vitedge.artifact import hash_files
    from vitedge.package.verify import verify

    verified = verify(bundle, run=not no_run)
    sha256 = hash_files([bundle])
    if as_json:
        emit_json(
            {
                "schema_version": 1,
                "bundle": str(bundle),
                "sha256": sha256,
                "ok": True,
                "checks": [asdict(check) for check in verified.checks],
            }
        )
        return
    for check in verified.checks:
        say(f"ok  {check.name}: {check.detail}")
    say(f"{bundle}: ok, sha256 {sha256}")
