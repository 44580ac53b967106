"""Print versions and hardware, for a bug report."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._output import emit_json, json_option

if TYPE_CHECKING:
    from vitedge.host import Host

# Extras that are sums of others say nothing of their own.
_SUMS = ("all", "dev")


@click.command("env")
@json_option
def command(as_json: bool) -> None:
    """Print versions and hardware, to paste into a bug report.

    Reads versions from package metadata; torch is not imported.
    """
    from dataclasses import asdict

    import vitedge
    from vitedge.host import onnxruntime_packages, probe

    host = probe()
    extras = _extras()
    packages = onnxruntime_packages()
    if as_json:
        plain = asdict(host)
        engines = plain.pop("engines")
        emit_json(
            {
                "schema_version": 1,
                "vitedge": vitedge.__version__,
                "host": plain,
                "engines": engines,
                "onnxruntime_packages": packages,
                "extras": extras,
            }
        )
        return
    for name, value in _rows(vitedge.__version__, host, packages, extras):
        click.echo(f"{name + ':':22} {value}")


def _extras() -> dict[str, dict[str, Any]]:
    """Per extra of vitedge: versions of its packages that are here, those that are missing, and the pip line for them."""
    import importlib.metadata

    from vitedge.host import tool_versions

    members: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("vitedge") or []:
        match = re.match(r"^([A-Za-z0-9_.-]+).*;.*extra == ['\"]([^'\"]+)['\"]", requirement)
        if match and match.group(2) not in _SUMS:
            members.setdefault(match.group(2), []).append(match.group(1))
    extras = {}
    for extra, names in sorted(members.items()):
        installed = tool_versions(names)
        missing = [name for name in names if name not in installed]
        extras[extra] = {"installed": installed, "missing": missing, "fix": f"pip install 'vitedge[{extra}]'" if missing else None}
    return extras


def _rows(version: str, host: Host, packages: list[str], extras: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    rows = [
        ("vitedge", version),
        ("python", host.python),
        ("os", f"{host.os}, {host.kernel}"),
        ("cpu", f"{host.cpu} ({host.arch})"),
        ("isa", " ".join(host.isa) or "none of the sets vitedge knows"),
        ("cores", f"{host.usable_cores} usable of {host.logical_cores}"),
        ("memory", f"{host.memory_mib} MiB usable"),
        ("gpu", ", ".join(host.gpus) or "none"),
        ("load", " ".join(f"{value:.2f}" for value in host.load_average)),
    ]
    for name, engine in host.engines.items():
        said = f"{engine.version} on {', '.join(engine.providers)}" if engine.version else f"{engine.reason}; {engine.fix}"
        rows.append((f"engine {name}", said))
        rows += [(f"  not {provider}", why) for provider, why in engine.absent.items()]
    clash = "; these overwrite each other: pip uninstall all of them, then install one" if len(packages) > 1 else ""
    rows.append(("onnxruntime package", (", ".join(packages) or "none") + clash))
    for extra, state in extras.items():
        parts = [f"{name} {found}" for name, found in state["installed"].items()]
        if state["missing"]:
            parts.append(f"missing {', '.join(state['missing'])}: {state['fix']}")
        rows.append((f"extra [{extra}]", ", ".join(parts)))
    return rows
