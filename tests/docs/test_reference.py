"""The built reference has every name of the packages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import zlib
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import annotated_types
import click
import pytest

import robo_orchard_core
import robo_orchard_lab
from robo_orchard_core.utils.config import Config
from robo_orchard_lab.cli.errors import ExitCode
from robo_orchard_lab.cli.main import COMMANDS
from robo_orchard_lab.experiment import parts
from robo_orchard_lab.pipeline import CHANNEL_NAMES, PipelineHookArgs, PipelineHooks, sinks
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig
from robo_orchard_lab.pipeline.requests import Requests

PREFIXES: dict[type[Config], str] = {
    parts.ExperimentFields: "",
    parts.LoaderConfig: "data.train.",
    parts.DataOrderConfig: "data.order.",
    parts.DataConfig: "data.",
    parts.ParameterGroup: "optimizer.groups.NAME.",
    parts.OptimizerFields: "optimizer.",
    parts.OptimizerConfig: "optimizer.",
    parts.OptimizerFunctionConfig: "optimizer.",
    parts.LRSchedulerFields: "lr_scheduler.",
    parts.LRSchedulerConfig: "lr_scheduler.",
    parts.LRSchedulerFunctionConfig: "lr_scheduler.",
    parts.TrainerConfig: "trainer.",
    parts.AcceleratorConfig: "accelerator.",
    parts.InitialWeights: "init_from.",
    parts.CompileConfig: "compile.",
    SaveCheckpointConfig: "checkpoint.",
}
"""Where the fields of each config class are in a file."""


@pytest.fixture(scope="module")
def objects(site: Path) -> dict[str, dict[str, str]]:
    """Return the pages of all objects of the site by kind and name."""
    found: dict[str, dict[str, str]] = {}
    content = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    for line in zlib.decompress(content).decode().splitlines():
        match = re.fullmatch(r"(.+?) (\S+:\S+) (-?\d+) (\S+) (.*)", line)
        assert match, line
        name, kind, _, page, _ = match.groups()
        found.setdefault(kind, {})[name] = page
    return found


def _modules() -> Iterator[ModuleType]:
    for package in (robo_orchard_core, robo_orchard_lab):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                yield importlib.import_module(module.name)


def test_every_public_name_is_in_the_api(site: Path, objects: dict[str, dict[str, str]]) -> None:
    """Each name of an ``__all__`` is documented, or listed by its module as that of another one."""
    documented = {name for kind, names in objects.items() if kind[:3] == "py:" for name in names}
    missing = []
    for module in _modules():
        page = site / "api" / f"{module.__name__}.html"
        for name in getattr(module, "__all__", ()):
            if f"{module.__name__}.{name}" not in documented:
                also = page.read_text("utf-8").partition("also exports")[2]
                if not re.search(rf"\b{name}\b", also):
                    missing.append(f"{module.__name__}.{name}")
    assert missing == []


def test_every_field_of_files_is_in_the_reference(objects: dict[str, dict[str, str]]) -> None:
    """Each field of an experiment and of its parts has an entry."""
    classes = {
        value
        for value in vars(parts).values()
        if isinstance(value, type)
        and issubclass(value, Config)
        and value.__module__ == parts.__name__
        and value.__name__.isidentifier()  # no parametrization
        and not value.__name__.startswith("_")
    }
    assert classes == PREFIXES.keys() - {SaveCheckpointConfig}
    fields = objects["std:field"]
    missing = [
        f"{prefix}{name}"
        for cls, prefix in PREFIXES.items()
        for name in cls.model_fields
        if name not in ("class_type", "func")  # of classes and functions that a file names
        and f"{prefix}{name}" not in fields
        and not any(field.startswith(f"{prefix}{name}.") for field in fields)  # a nested config
    ]
    assert missing == []
    assert {"base", "$schema", *SaveCheckpointConfig.model_fields} - {
        field.removeprefix("checkpoint.") for field in fields
    } == {"class_type"} & SaveCheckpointConfig.model_fields.keys()


def test_entries_have_default_and_range(site: Path) -> None:
    """An entry of a field states its type and default, and each limit of its value."""
    text = _text(site / "reference" / "fields.html")
    for name, field in parts.TrainerConfig.model_fields.items():
        head = rf"\btrainer\.{name}: (?:int|float) \| null = null\n"
        entry = re.search(rf"{head}(.*?)\n\w+\.\w+: ", text, re.S)
        assert entry, name
        assert str(field.description) in entry[1]
        limits = [rule for rule in field.metadata if isinstance(rule, annotated_types.Ge)]
        assert (f"at least {limits[0].ge}" if limits else "more than 0") in entry[1]
    assert "seed: int = 0" in text
    assert "less than 4294967296" in text
    assert "The fields of data.evaluation.NAME are those of data.train." in text


def test_every_hook_and_sink_is_in_the_reference(
    site: Path, objects: dict[str, dict[str, str]]
) -> None:
    """Each exported hook is on the page of hooks, with all fields; likewise each sink."""
    from robo_orchard_lab import policy, search
    from robo_orchard_lab.pipeline import hooks

    page = _text(site / "reference" / "hooks.html")
    found = 0
    for package in (hooks, policy, search, sinks):
        for name in package.__all__:
            value = getattr(package, name)
            config: Any = getattr(package, f"{name}Config", None)
            if isinstance(value, type) and issubclass(value, PipelineHooks):
                assert re.search(rf"^{name}\b", page, re.M), name
            if config is not None:
                found += 1
                names = [field for field in config.model_fields if field != "class_type"]
                entries = {field.partition("(")[0] for field in objects["std:field"]}
                parents = {entry.rpartition(".")[0] for entry in entries}  # of nested configs
                assert [f for f in names if f"{name}.{f}" not in entries | parents] == [], name
    assert found > 25
    assert "Runs on on_loop, on_epoch, on_optimizer_step" in page  # EMA
    assert "Requests stop, save." in page  # Preemption


def test_channels_and_arguments_are_in_the_reference(objects: dict[str, dict[str, str]]) -> None:
    """Each channel, each field and method of ``args``, and each request has an entry."""
    assert {*CHANNEL_NAMES} == objects["std:channel"].keys()
    entries = objects["std:field"]
    public = {name for name in dir(PipelineHookArgs) if not name.startswith("_")}
    engine = {"begin_entry", "failing", "channels_of", "is_assignable", "is_filler"}
    assert [name for name in sorted(public - engine) if f"args.{name}" not in entries] == []
    requests = ("stop", "save", "evaluate", "log", "save_weights", "write", "rollback")
    for name in (*requests, "allow_rank_local"):
        assert hasattr(Requests, name)
        assert f"args.requests.{name}" in entries


def test_every_command_is_in_the_reference(objects: dict[str, dict[str, str]]) -> None:
    """Each command and subcommand has an entry, and each of its options."""
    found = dict(_commands())
    assert len(found) > 25
    assert found.keys() == objects["std:command"].keys()
    options = objects["std:cmdoption"]
    missing = [
        f"{name} {flag}"
        for name, command in found.items()
        for option in command.params
        if isinstance(option, click.Option) and not option.hidden
        for flag in option.opts
        if f"{name.replace(' ', '-')}.{flag}" not in options
    ]
    assert missing == []


def _commands() -> Iterator[tuple[str, click.Command]]:
    for section in COMMANDS.values():
        for name, (_, reference) in section.items():
            module, _, attribute = reference.partition(":")
            command = getattr(importlib.import_module(module), attribute)
            yield from _with_inner(f"robo-orchard-lab {name}", command)


def _with_inner(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for inner in command.commands:
            yield from _with_inner(f"{name} {inner}", command.commands[inner])


def test_every_error_and_exit_code_is_in_the_reference(
    site: Path, objects: dict[str, dict[str, str]]
) -> None:
    """Each class of errors has an entry with its exit code, and each exit code has a line."""
    errors = {
        name
        for module in _modules()
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, BaseException)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }
    assert len(errors) > 25
    assert errors == objects["std:error"].keys()
    page = _text(site / "reference" / "errors.html")
    for code in ExitCode:
        assert f"ExitCode.{code.name}" in page
    assert re.search(r"^PipelineConfigError\n.*?Exit code: 2", page, re.M | re.S)


def _text(page: Path) -> str:
    """Return the text of a page, with a line for each paragraph."""
    html = page.read_text("utf-8")
    html = html[html.index("<article") : html.index("</article")]
    html = re.sub(r'<a class="headerlink".*?</a>', "", html)
    html = re.sub(r"\s*</(p|dt|dd|h\d|li|td|tr)>\s*", "\n", html)
    return unescape(re.sub(r"<[^>]+>", "", html))
