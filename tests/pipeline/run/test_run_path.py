"""Paths within the run folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytest

from robo_orchard_core.utils.config import Config, ConfigFieldError, config_of
from robo_orchard_lab.pipeline import hooks, sinks
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    KeepBestConfig,
    MetricsLoggerConfig,
    NonFiniteGuardConfig,
    SaveCheckpointConfig,
    SaveModelConfig,
    TorchProfilerHookConfig,
)
from robo_orchard_lab.pipeline.run.run_path import RunPath, check_run_paths, in_run_folder
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, LogSinkConfig, TrackerSinkConfig

RUN = Path("runs/one")


class Dump(Config):
    path: Annotated[str, RunPath()] = "dump.txt"
    name: Annotated[str, RunPath(joined=False)] = "dump"
    source: str = "/data"


class Several(Config):
    one: Dump = Dump()
    more: dict[str, list[Dump]] = {}  # noqa: RUF012 - a field, which is copied
    pair: tuple[Dump, Dump] | None = None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EMAConfig(export_path="ema.safetensors"), {"export_path": "runs/one/ema.safetensors"}),
        (
            KeepBestConfig(monitor="loss", mode="min", path=Path("best/a.safetensors")),
            {"path": RUN / "best/a.safetensors"},
        ),
        (NonFiniteGuardConfig(quarantine=Path("bad")), {"quarantine": RUN / "bad"}),
        (SaveCheckpointConfig(folder=Path("saves")), {"folder": RUN / "saves"}),
        (SaveModelConfig(folder=Path("model")), {"folder": RUN / "model"}),
        (TorchProfilerHookConfig(folder="traces"), {"folder": "runs/one/traces"}),
        (JsonLinesSinkConfig(), {"path": "runs/one/metrics.jsonl"}),
        (TrackerSinkConfig(folder="."), {"folder": "runs/one", "project": "training"}),
    ],
)
def test_paths_of_hooks_and_sinks_are_in_the_run_folder(
    config: Config, expected: dict[str, Any]
) -> None:
    """Every path of a built-in hook or sink is moved into the run folder with its type kept."""
    inside = in_run_folder(config, RUN)
    assert {name: getattr(inside, name) for name in expected} == expected


CONFIGS = [
    getattr(module, name)
    for module in (hooks, sinks)
    for name in module.__all__
    if name.endswith("Config") and name != "SinkConfig"
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_path_field_is_marked(config: type[Config]) -> None:
    """Every path field of a hook or sink has a RunPath mark."""
    for name, field in config.model_fields.items():
        is_path = "Path" in str(field.annotation) or {"path", "folder"} & {*name.split("_")}
        marked = any(isinstance(mark, RunPath) for mark in field.metadata)
        assert marked or not is_path, name


@pytest.mark.parametrize("config", [SaveCheckpointConfig(), SaveModelConfig(), LogSinkConfig()])
def test_a_config_without_paths_is_unchanged(config: Config) -> None:
    """Fields of None stay None, and the config is the same object."""
    assert in_run_folder(config, RUN) is config


def test_nested_configs_are_reached() -> None:
    """Paths in lists, tuples and mappings are moved, and the given config is unchanged."""
    given = Several(more={"a": [Dump(path="x"), Dump()]}, pair=(Dump(), Dump(path="y")))
    inside = in_run_folder(given, RUN)
    assert [dump.path for dump in inside.more["a"]] == ["runs/one/x", "runs/one/dump.txt"]
    assert inside.pair is not None
    assert [dump.path for dump in inside.pair] == ["runs/one/dump.txt", "runs/one/y"]
    assert inside.one.source == "/data"
    assert given.one.path == "dump.txt"
    logger = in_run_folder(MetricsLoggerConfig(sinks={"a": JsonLinesSinkConfig()}), RUN)
    assert logger.sinks == {"a": JsonLinesSinkConfig(path="runs/one/metrics.jsonl")}


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "..", "a\0b", "a\x1b[2J"])
@pytest.mark.parametrize("field", ["path", "name"])
def test_a_path_out_of_the_run_folder_is_refused(field: str, path: str) -> None:
    """The error names the field at any depth."""
    bad = Several(more={"a": [Dump(), Dump(**{field: path})]})
    with pytest.raises(ConfigFieldError, match="within the run folder") as error:
        check_run_paths(bad)
    assert error.value.location == f"more.a.1.{field}"
    with pytest.raises(ConfigFieldError):
        in_run_folder(bad, RUN)


class Dumper:
    """Declares its path in the constructor, and accepts unknown arguments."""

    def __init__(
        self, path: Annotated[str, RunPath()] = "dump.txt", source: str = "/data", **more: Any
    ) -> None:
        self.paths = (path, source, more)


def test_a_constructor_parameter_may_be_a_run_path() -> None:
    """The default of a RunPath parameter is moved into the run folder."""
    assert in_run_folder(config_of(Dumper), RUN)().paths == ("runs/one/dump.txt", "/data", {})
    assert in_run_folder(config_of(Dumper, path="a"), RUN)().paths[0] == "runs/one/a"
    with pytest.raises(ConfigFieldError, match="path"):
        check_run_paths(config_of(Dumper, path="/a"))


def test_configs_in_open_arguments_are_restricted() -> None:
    """Configs passed through ``**kwargs`` are restricted to the run folder."""
    dumper = config_of(Dumper, sinks={"file": JsonLinesSinkConfig(path="m.jsonl")})
    made = in_run_folder(dumper, RUN)()
    assert made.paths[2]["sinks"]["file"].path == RUN / "m.jsonl"
    with pytest.raises(ConfigFieldError) as found:
        check_run_paths(dumper.replace(**{"sinks.file.path": "/m.jsonl"}))
    assert found.value.location == "sinks.file.path"


@pytest.mark.parametrize("path", ["link", "link/dump.txt", "inner/link"])
def test_a_path_through_a_link_is_refused(path: str, tmp_path: Path) -> None:
    """A path through a symbolic link in the run folder is refused."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/link").symlink_to("/tmp")
    (tmp_path / "link").symlink_to(tmp_path)
    check_run_paths(Dump(path=path))
    with pytest.raises(ConfigFieldError, match="is a link") as error:
        in_run_folder(Several(one=Dump(path=path)), tmp_path)
    assert error.value.location == "one.path"
    assert in_run_folder(Dump(path="inner/dump.txt"), tmp_path).path


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (TorchProfilerHookConfig, "folder"),
        (EMAConfig, "export_path"),
        (JsonLinesSinkConfig, "path"),
        (partial(TrackerSinkConfig, trackers=["tensorboard"]), "folder"),
    ],
)
def test_configs_accept_a_path_object(make: Any, field: str) -> None:
    """The field holds the text of the path, as in a file."""
    config = make(**{field: Path("out/a.safetensors")})
    assert getattr(config, field) == "out/a.safetensors"
    assert type(config).from_str(config.to_str("json"), "json") == config
