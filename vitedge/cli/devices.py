"""List and show device profiles, and write one of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._output import emit_json, json_option, say

if TYPE_CHECKING:
    from vitedge.host import Host


@click.group("devices")
def command() -> None:
    """Device profiles: YAML files that each say what one target is, and where each fact comes from.

    \b
    vitedge devices list                       those that come with vitedge, and whether this host is one
    vitedge devices probe -o my_board.yaml     write the profile of this host
    vitedge bench --device my_board.yaml       and measure under it
    """


@command.command("list")
@json_option
def list_devices(as_json: bool) -> None:
    """Names of the profiles that come with vitedge, and where this host differs from them."""
    from vitedge.device import load_device, mismatches
    from vitedge.host import probe_host
    from vitedge.schema import list_files

    host = probe_host()
    rows = []
    for name, path in list_files("devices").items():
        device = load_device(name)
        rows.append({"name": name, "description": device.description, "path": str(path), "mismatches": mismatches(device, host)})
    if as_json:
        emit_json({"schema_version": 1, "devices": rows})
        return
    width = max((len(str(row["name"])) for row in rows), default=0)
    for row in rows:
        differing = "; ".join(str(reason) for reason in row["mismatches"])
        click.echo(f"{row['name']:{width}}  {row['description']}{f' (not this host: {differing})' if differing else ''}")


@command.command("show")
@click.argument("device", metavar="NAME|PATH")
@json_option
def show(device: str, as_json: bool) -> None:
    """A profile, and what of it can be used on this host."""
    import yaml

    from vitedge.device import load_device, mismatches, usable_runtimes
    from vitedge.host import probe

    profile = load_device(device)
    host = probe()
    rows = [
        {"runtime": use.runtime, "provider": use.provider, "precision": precision, "reason": reason or None}
        for use, precision, reason in usable_runtimes(profile, host)
    ]
    differing = mismatches(profile, host)
    if as_json:
        emit_json({"schema_version": 1, "device": profile.model_dump(mode="json"), "mismatches": differing, "runtimes": rows})
        return
    click.echo(yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120).rstrip())
    say(f"this host: {'; '.join(differing) or 'is such a device'}")
    for row in rows:
        say(f"  {row['runtime']} {row['provider']} {row['precision']}: {row['reason'] or 'can be used'}")


@command.command("probe")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the profile to this .yaml file, else print it."
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
@json_option
def probe_device(output: Path | None, overwrite: bool, as_json: bool) -> None:
    """Write a device profile of this host.

    Instruction sets, cores that may be used (affinity and container quota), memory, engines and
    their providers, each fact with its source.

    \b
    vitedge devices probe -o my_board.yaml
    """
    import datetime
    from dataclasses import asdict

    import vitedge
    from vitedge.artifact import write_text
    from vitedge.host import device_profile, probe

    name = _check_output(output, overwrite) if output else "this_host"
    host = probe()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    profile = device_profile(host, name, f"probed on {today} by vitedge {vitedge.__version__}")
    text = _to_yaml(profile.to_plain(), f"{profile.description}; probed on {today}.", output)
    if output:
        write_text(output, text)
    if as_json:
        plain = {"name": name, **profile.to_plain()}
        emit_json({"schema_version": 1, "path": str(output) if output else None, "device": plain, "host": asdict(host)})
        return
    if not output:
        click.echo(text.rstrip())
    for line in _summary(host):
        say(line)
    if output:
        say(f"wrote {output}; use it with --device {output}")


def _check_output(output: Path, overwrite: bool) -> str:
    """The profile's name.

    Raises:
        UsageError: A file that is there already, or a name that cannot be a profile's.
    """
    from vitedge.errors import UsageError

    if output.suffix not in (".yaml", ".yml") or not re.match(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", output.stem):
        raise UsageError(
            str(output),
            expected="a .yaml file named with letters, digits, '_', '-' and '.'",
            found=f"'{output.name}'",
            fix="choose another name with -o",
        )
    if output.exists() and not overwrite:
        raise UsageError(
            str(output), expected="a new file", found="a file that is there", fix="add --overwrite, or choose another name with -o"
        )
    return output.stem


def _to_yaml(plain: dict[str, Any], first_line: str, output: Path | None) -> str:
    import yaml

    plain = {key: value for key, value in plain.items() if key != "name"}
    command_line = f"vitedge bench --device {output.name if output else 'FILE'}"
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
    return f"# {first_line}\n#\n#   {command_line}\n{body}"


def _summary(host: Host) -> list[str]:
    lines = [
        f"{host.cpu} ({host.arch}), {host.usable_cores} of {host.logical_cores} cores usable, {host.memory_mib} MiB",
        f"instruction sets: {' '.join(host.isa) or 'none that vitedge knows'}",
        f"GPUs: {', '.join(host.gpus) or 'none'}",
    ]
    for name, engine in host.engines.items():
        said = f"{engine.version} on {', '.join(engine.providers)}" if engine.version else f"{engine.reason}; {engine.fix}"
        lines.append(f"{name}: {said}")
    return lines
