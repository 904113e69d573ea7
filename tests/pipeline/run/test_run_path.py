"""Paths that lie in the run's folder."""

from __future__ import annotations

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
def test_what_hooks_and_sinks_write_lies_in_the_run_folder(
    config: Config, expected: dict[str, Any]
) -> None:
    """Every path of a built-in hook or sink is put there, in its own type."""
    inside = in_run_folder(config, RUN)
    assert {name: getattr(inside, name) for name in expected} == expected


CONFIGS = [
    getattr(module, name)
    for module in (hooks, sinks)
    for name in module.__all__
    if name.endswith("Config") and name != "SinkConfig"
]


@pytest.mark.parametrize("config", CONFIGS)
def test_no_path_is_forgotten(config: type[Config]) -> None:
    """Whatever a hook or sink has a path for is marked as one that it writes."""
    for name, field in config.model_fields.items():
        is_path = "Path" in str(field.annotation) or {"path", "folder"} & {*name.split("_")}
        marked = any(isinstance(mark, RunPath) for mark in field.metadata)
        assert marked or not is_path, name


@pytest.mark.parametrize("config", [SaveCheckpointConfig(), SaveModelConfig(), LogSinkConfig()])
def test_what_has_no_path_stays_as_it_is(config: Config) -> None:
    """Fields that are None stay None, and the config is the same object."""
    assert in_run_folder(config, RUN) is config


def test_configs_within_are_reached() -> None:
    """In lists, tuples and mappings; the given config is not changed."""
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
    """The error names the field, however deep it lies."""
    bad = Several(more={"a": [Dump(), Dump(**{field: path})]})
    with pytest.raises(ConfigFieldError, match="within the run folder") as error:
        check_run_paths(bad)
    assert error.value.location == f"more.a.1.{field}"
    with pytest.raises(ConfigFieldError):
        in_run_folder(bad, RUN)


class Dumper:
    """Says in its constructor what it writes, and hands on what it doesn't know."""

    def __init__(
        self, path: Annotated[str, RunPath()] = "dump.txt", source: str = "/data", **more: Any
    ) -> None:
        self.paths = (path, source, more)


def test_a_constructor_may_say_what_is_written() -> None:
    """Then its default lies in the run's folder as well."""
    assert in_run_folder(config_of(Dumper), RUN)().paths == ("runs/one/dump.txt", "/data", {})
    assert in_run_folder(config_of(Dumper, path="a"), RUN)().paths[0] == "runs/one/a"
    with pytest.raises(ConfigFieldError, match="path"):
        check_run_paths(config_of(Dumper, path="/a"))


def test_arguments_beside_fields_are_held_to_the_run_folder() -> None:
    """What an open constructor takes may hold configs that write."""
    dumper = config_of(Dumper, sinks={"file": JsonLinesSinkConfig(path="m.jsonl")})
    made = in_run_folder(dumper, RUN)()
    assert made.paths[2]["sinks"]["file"].path == RUN / "m.jsonl"
    with pytest.raises(ConfigFieldError) as found:
        check_run_paths(dumper.replace(**{"sinks.file.path": "/m.jsonl"}))
    assert found.value.location == "sinks.file.path"


@pytest.mark.parametrize("path", ["link", "link/dump.txt", "inner/link"])
def test_a_path_through_a_link_is_refused(path: str, tmp_path: Path) -> None:
    """What somebody has put into the folder leads nowhere else."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/link").symlink_to("/tmp")
    (tmp_path / "link").symlink_to(tmp_path)
    check_run_paths(Dump(path=path))
    with pytest.raises(ConfigFieldError, match="is a link") as error:
        in_run_folder(Several(one=Dump(path=path)), tmp_path)
    assert error.value.location == "one.path"
    assert in_run_folder(Dump(path="inner/dump.txt"), tmp_path).path
