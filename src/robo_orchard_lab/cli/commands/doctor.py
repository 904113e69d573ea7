"""``doctor``: what there is of what a training needs, and how to get what there isn't."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from typing import Any

import click

from robo_orchard_lab.cli.installation import (
    Requirement,
    extras,
    install_command,
    requirements,
    version_of,
)
from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import (
    DISTRIBUTION,
    json_option,
    print_json,
    print_table,
    say,
    styled,
)

_LONGEST_S = 120


@click.command("doctor", cls=Command)
@json_option
def command(as_json: bool) -> int:
    """Show versions and devices, and what is missing, with the command that installs it.

    It ends with 1 where something is missing or broken that no training can do without. It looks
    into torch in a process of its own, and so works where torch doesn't.
    """
    try:
        needed, more = requirements(), extras()
    except PackageNotFoundError:
        needed, more = [], {}
    found = _probed()
    broken = [one for one in needed if not one.is_met]
    errors = {
        name: told["error"]
        for name, told in found.items()
        if isinstance(told, dict) and "error" in told
    }
    if as_json:
        print_json(
            {
                "python": platform.python_version(),
                "platform": platform.platform(),
                DISTRIBUTION: version_of(DISTRIBUTION),
                "packages": [{**asdict(one), "ok": one.is_met} for one in needed],
                "extras": {name: _extra(parts) for name, parts in more.items()},
                **found,
                "ok": not (broken or errors),
            }
        )
    else:
        _print(needed, more, found)
        _print_verdict(broken, errors)
    return 1 if broken or errors else 0


def _probed() -> dict[str, Any]:
    """What `probe` finds; what it could not say since it ended is an error."""
    command = [sys.executable, "-P", "-m", "robo_orchard_lab.cli.probe"]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=_LONGEST_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"torch": {"error": f"importing it takes more than {_LONGEST_S} s"}}
    found: dict[str, Any] = {}
    for line in ended.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        problem = f"the process that looked into it ended with {ended.returncode}"
        found.setdefault("torch", {"error": f"{problem}: {last}" if last else problem})
    return found


def _extra(parts: list[Requirement]) -> dict[str, Any]:
    missing = [one for one in parts if not one.is_met]
    return {
        "missing": [one.to_install for one in missing],
        "install": install_command(missing) if missing else None,
    }


def _print(
    needed: list[Requirement], more: dict[str, list[Requirement]], found: dict[str, Any]
) -> None:
    say(f"{DISTRIBUTION} {version_of(DISTRIBUTION) or '(not installed: run from its sources)'}")
    say(f"Python {platform.python_version()} on {platform.platform()}")
    if needed:
        say()
        print_table(["package", "found", "needed", "for"], _package_rows(needed, more))
    incomplete = {name: parts for name, parts in more.items() if not all(p.is_met for p in parts)}
    if incomplete:
        say()
        rows = [(name, _extra(parts)["install"]) for name, parts in incomplete.items()]
        print_table(["incomplete extra", "what installs the rest"], rows)
    say()
    _print_torch(found)


def _package_rows(
    needed: list[Requirement], more: dict[str, list[Requirement]]
) -> list[tuple[str, str, str, str]]:
    used_by = {one: ["all"] for one in needed}
    for name, parts in more.items():
        for one in parts:
            used_by.setdefault(one, []).append(name)
    return [
        (
            one.name,
            (one.found or "missing") + ("" if one.is_met or one.found is None else " (!)"),
            one.needed or "any",
            ", ".join(users),
        )
        for one, users in used_by.items()
    ]


def _print_torch(found: dict[str, Any]) -> None:
    torch, devices = found.get("torch", {}), found.get("devices", [])
    if "version" in torch:
        built = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}"
        built = built if torch["cuda"] or torch["hip"] else "CPU only"
        say(
            f"torch {torch['version']} ({built}), imported in {torch['import_s']} s; "
            f"{torch['threads']} threads, {torch['cpu_capability']}"
        )
        say(f"exchanges between processes: {', '.join(found.get('distributed', [])) or 'none'}")
    if isinstance(devices, list) and devices:
        say()
        rows = [
            (
                device["device"],
                device["name"],
                f"{device['memory_gib']} GiB" if "memory_gib" in device else "",
            )
            for device in devices
        ]
        print_table(["device", "is", "memory"], rows)


def _print_verdict(broken: list[Requirement], errors: dict[str, str]) -> None:
    say()
    for name, error in errors.items():
        say(styled(f"{name} can't be used: {error}", "red"))
    if broken:
        say(styled(f"missing or of another version: {install_command(broken)}", "red"))
    if not (broken or errors):
        say(styled("All that a training needs is there.", "green"))
