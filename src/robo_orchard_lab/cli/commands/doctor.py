"""Commands ``doctor`` and ``completion``.

``doctor`` imports torch in another process (``python -m robo_orchard_lab.cli.commands.doctor``),
which prints its findings as lines of JSON: a broken torch may end the process that imports it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from time import perf_counter
from typing import Any

import click
from click.shell_completion import get_completion_class

from robo_orchard_lab.cli.commands import Command
from robo_orchard_lab.cli.output import (
    COMPLETE_VARIABLE,
    DISTRIBUTION,
    PROGRAM,
    json_option,
    print_json,
    print_table,
    say,
    styled,
)

_TIMEOUT_S = 120


@click.command("doctor", cls=Command)
@json_option
def doctor(as_json: bool) -> int:
    """Show versions, devices and missing packages, with the command that installs them.

    \b
      robo-orchard-lab doctor
      robo-orchard-lab doctor --json

    Exits with 1 if a required package is missing or broken. Works also if torch can't be imported.
    """
    try:
        needed, extras = requirements()
    except (PackageNotFoundError, ImportError):  # packaging comes with accelerate
        needed, extras = [], {}
    found = _probe()
    broken = [each for each in needed if not each.is_met]
    errors = {
        name: result["error"]
        for name, result in found.items()
        if isinstance(result, dict) and "error" in result
    }
    is_complete = not (broken or errors)
    if as_json:
        report = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            DISTRIBUTION: version_of(DISTRIBUTION),
            "packages": [{**asdict(each), "ok": each.is_met} for each in needed],
            "extras": {name: _missing(packages) for name, packages in extras.items()},
            **found,
            "ok": is_complete,
        }
        print_json(report)
        return 0 if is_complete else 1
    say(f"{DISTRIBUTION} {version_of(DISTRIBUTION) or '(not installed: run from source)'}")
    say(f"Python {platform.python_version()} on {platform.platform()}")
    users = {each: ["all"] for each in needed}
    for name, packages in extras.items():
        for each in packages:
            users.setdefault(each, []).append(name)
    _print_rows(
        ["package", "found", "needed", "for"],
        [(each.name, each.state, each.needed or "any", ", ".join(users[each])) for each in users],
    )
    installs = {name: _missing(packages)["install"] for name, packages in extras.items()}
    _print_rows(
        ["incomplete extra", "install command"],
        [(name, command) for name, command in installs.items() if command],
    )
    if "version" in (torch := found.get("torch", {})):
        build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}"
        build = build if torch["cuda"] or torch["hip"] else "CPU only"
        say(
            f"\ntorch {torch['version']} ({build}), imported in {torch['import_s']} s; "
            f"{torch['threads']} threads, {torch['cpu_capability']}"
        )
        say(f"distributed backends: {', '.join(found.get('distributed', [])) or 'none'}")
    if isinstance(devices := found.get("devices", []), list):
        _print_rows(
            ["device", "is", "GiB"],
            [(each["device"], each["name"], str(each.get("memory_gib", ""))) for each in devices],
        )
    say()
    for name, error in errors.items():
        say(styled(f"{name} can't be used: {error}", "red"))
    if broken:
        say(styled(f"missing or incompatible: {install_command(broken)}", "red"))
    if is_complete:
        say(styled("Everything that a training requires is installed.", "green"))
    return 0 if is_complete else 1


def _print_rows(headings: list[str], rows: list[tuple[str, ...]]) -> None:
    if rows:
        say()
        print_table(headings, rows)


def _missing(packages: list[Requirement]) -> dict[str, Any]:
    missing = [each for each in packages if not each.is_met]
    return {
        "missing": [each.specifier for each in missing],
        "install": install_command(missing) if missing else None,
    }


@dataclass(frozen=True)
class Requirement:
    """Required distribution and its installed version.

    Attributes:
        name: Name of the distribution.
        needed: Version specifier, such as ``>=2.8``; empty for any version.
        found: Installed version; None if not installed.
    """

    name: str
    needed: str
    found: str | None

    @property
    def is_met(self) -> bool:
        """Return True if an installed version satisfies the specifier."""
        from packaging.specifiers import SpecifierSet

        return self.found is not None and SpecifierSet(self.needed).contains(
            self.found, prereleases=True
        )

    @property
    def state(self) -> str:
        """Installed version, marked if it is the wrong one."""
        return "missing" if self.found is None else self.found + ("" if self.is_met else " (!)")

    @property
    def specifier(self) -> str:
        """Argument for pip."""
        return self.name + self.needed


def requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Return the required packages of this distribution, and those of each extra except ``dev``.

    Raises:
        PackageNotFoundError: the distribution is not installed.
    """
    from packaging.requirements import Requirement as Parsed

    needed: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    names = metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    for parsed in map(Parsed, requires(DISTRIBUTION) or ()):
        each = Requirement(parsed.name, str(parsed.specifier), version_of(parsed.name))
        if parsed.marker is None:
            needed.append(each)
            continue
        for name in names:
            if name != "dev" and parsed.marker.evaluate({"extra": name}):
                extras.setdefault(name, []).append(each)
    return needed, extras


def install_command(missing: list[Requirement]) -> str:
    """Return the pip command to install packages."""
    return " ".join(["pip install", *(f'"{each.specifier}"' for each in missing)])


def version_of(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _probe() -> dict[str, Any]:
    """Return the findings of another process; a crash or a timeout is an error of torch."""
    command = [sys.executable, "-P", "-m", __name__]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"torch": {"error": f"the import takes more than {_TIMEOUT_S} s"}}
    found: dict[str, Any] = {}
    for line in result.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [""])[-1]
        problem = f"the process that imported it exited with {result.returncode}"
        found.setdefault("torch", {"error": f"{problem}: {last}" if last else problem})
    return found


def _print_probe() -> None:
    for name, probe in _PROBES.items():
        try:
            result = probe()
        except BaseException as error:  # a broken installation raises anything
            lines = str(error).strip().splitlines()
            result = {"error": f"{type(error).__qualname__}: {lines[0] if lines else ''}"}
        print(json.dumps({name: result}), flush=True)
        if name == "torch" and "error" in result:
            break  # the other probes require torch


def _probe_torch() -> dict[str, Any]:
    start = perf_counter()
    import torch

    return {
        "version": torch.__version__,
        "import_s": round(perf_counter() - start, 2),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _probe_devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu", "name": f"{os.cpu_count()} cores"}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "bf16": properties.major >= 8 or torch.version.hip is not None,
                }
            )
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        found += [
            {"device": f"{kind}:{index}", "name": ""}
            for index in range(torch.accelerator.device_count())
        ]
    return found


def _probe_distributed() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    checks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    checks |= {"mpi": dist.is_mpi_available, "ucc": dist.is_ucc_available}
    return [name for name, is_available in checks.items() if is_available()]


_PROBES: dict[str, Callable[[], Any]] = {
    "torch": _probe_torch,
    "devices": _probe_devices,
    "distributed": _probe_distributed,
    "accelerate": lambda: import_module("accelerate").__version__,
}


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options, fields, hooks and files in a shell.

    \b
    For this session:
      bash  eval "$(robo-orchard-lab completion bash)"
      zsh   eval "$(robo-orchard-lab completion zsh)"
      fish  robo-orchard-lab completion fish | source
    For all sessions, add the line to ~/.bashrc, ~/.zshrc (after compinit), or
    ~/.config/fish/config.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # a shell of click
    # The template alone: click's own rendering starts bash to read its version.
    script = kind(None, {}, PROGRAM, COMPLETE_VARIABLE)  # type: ignore[arg-type]  # not used
    say(script.source_template % script.source_vars())


if __name__ == "__main__":
    _print_probe()
