"""Text of experiment files that becomes a path, a URL or an option of another library."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.experiment.hook_entries import NAMED, TRUST, experiment

from robo_orchard_core.utils.config import ConfigError, config_of
from robo_orchard_core.utils.config.build import import_class
from robo_orchard_core.utils.untrusted_text import path_problem
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.build import build_experiment, check_dataset_roots, make_hook
from robo_orchard_lab.experiment.catalogue import DEFINITIONS, kind_of
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sinks import TrackerSinkConfig

HOSTILE = [
    "../x",
    "a/../../x",
    "a\\..\\x",
    "/../x",
    "/tmp/robo_orchard_lab_x",
    "~/x",
    "$HOME/x",
    "C:\\x",
    "C:x",
    "\\\\host\\x",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "file:///tmp/robo_orchard_lab_x",
    "http://127.0.0.1:9/x",
    "gs://bucket/x",
    "?mode=ro",
    "x" * 5000,
    "é" * 200,
]

FEW = ["http://127.0.0.1:9/../x", *HOSTILE[::4]]

_recorded: list[str] | None = None
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def _record(event: str, args: tuple[Any, ...]) -> None:
    if _recorded is None:
        return
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        _recorded.append(f"{event} {args[1:]}")
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink") or (
        event == "open" and args[2] & _WRITES and isinstance(args[0], (str, bytes))
    ):
        _recorded.append(f"{event} {os.path.abspath(os.fsdecode(args[0]))}")


sys.addaudithook(_record)


@contextmanager
def only_within(folder: Path) -> Iterator[None]:
    """Check that nothing outside of a folder is created or opened for writing, and no socket."""
    global _recorded
    _recorded = []
    try:
        yield
    finally:
        found, _recorded = _recorded, None
    inside = (str(folder), "/dev/null", "/proc/", "/tmp/torchinductor_")  # of an import
    assert [f for f in found if not f.partition(" ")[2].startswith(inside)] == []


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_text(value: Any, text: str) -> Iterator[Any]:
    """Yield copies of plain data with each of its strings replaced."""
    if isinstance(value, str):
        yield text
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("class_type", "func"):
                yield from ({**value, key: changed} for changed in with_text(item, text))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            for changed in with_text(item, text):
                yield [*value[:index], changed, *value[index + 1 :]]


TENSORBOARD = {
    "sinks": {
        "it": {
            "class_type": "TrackerSink",
            "trackers": ["tensorboard"],
            "project": "x",
            "folder": "boards",
            "hyperparameters": {"a": "b"},
            "options": {"tensorboard": {"filename_suffix": ".x"}},
        }
    }
}


@pytest.mark.parametrize(
    ("name", "entry"), [*NAMED, ("MetricsLogger", TENSORBOARD)], ids=lambda value: str(value)[:20]
)
def test_text_in_hooks_stays_in_the_run_folder(
    name: str, entry: dict[str, Any], folder: Path
) -> None:
    """Each string of each hook and sink, hostile, is refused or used within the run folder."""
    run = folder / "runs" / "it"
    run.mkdir(parents=True)
    for text in FEW:
        for changed in with_text(entry, text):
            document = experiment(it={"class_type": name, **changed})
            with only_within(run), suppress(ValueError):
                config = ExperimentConfig.from_dict(document, trust=TRUST)
                make_hook(config.hooks["it"], run, {"val": [1]})
    assert sorted(os.listdir(folder)) == ["runs"]
    assert sorted(os.listdir(folder / "runs")) == ["it"]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_run_path_refuses_hostile_text(text: str) -> None:
    """All fields for paths refuse the same text, so no library gets to interpret it."""
    assert path_problem(text) is not None
    for name, entry in [*NAMED, ("MetricsLogger", TENSORBOARD)]:
        config = ExperimentConfig.from_dict(
            experiment(it={"class_type": name, **entry}), trust=TRUST
        ).hooks["it"]
        for field, declared in type(config).model_fields.items():
            if any(isinstance(mark, RunPath) for mark in declared.metadata):
                kind = type(getattr(config, field) or "")
                changed = config.model_copy(update={field: kind(text)})
                with pytest.raises(ConfigError, match="within the run folder"):
                    make_hook(changed, Path("runs/it"), {})


@pytest.mark.parametrize("suffix", [*HOSTILE, "/../../x", "a/b", ".."])
def test_suffix_of_tensorboard_is_no_path(suffix: str) -> None:
    """TensorBoard appends the suffix to a path, so it must not have a separator."""
    with pytest.raises(ValueError, match="filename_suffix: expected the end of a file's name"):
        TrackerSinkConfig(options={"tensorboard": {"filename_suffix": suffix}})
    with pytest.raises(ValueError, match="log_dir is not an option"):
        TrackerSinkConfig(options={"tensorboard": {"log_dir": suffix}})


OF_LIBRARIES = sorted(
    definition for definition in DEFINITIONS if not definition.startswith("robo_orchard_lab.")
)


@pytest.mark.parametrize("kind", ["dataset", "loader", "module", "optimizer", "sampler"])
def test_text_in_parts_of_libraries_creates_nothing(kind: str, folder: Path) -> None:
    """Each parameter for text of a catalogued class or function, hostile, writes nothing."""
    for definition in OF_LIBRARIES:
        if kind_of(definition) != kind:
            continue
        code = import_class(definition)
        fields = config_of(code).__class__.model_fields
        for name, field in fields.items():
            annotation = str(field.annotation)
            if name in ("class_type", "func") or not ("str" in annotation or "Any" in annotation):
                continue
            for text in FEW if kind == "dataset" else FEW[:1]:
                with only_within(folder), suppress(Exception):
                    config_of(code, **{name: text})()
    assert os.listdir(folder) == []


WEIGHTS = [
    {"weights": {"url": "http://127.0.0.1:9/x"}},
    {"weights": ["DEFAULT"]},
    {"weights": True},
    {"weights_backbone": 1},
    {"pretrained": True},
    {"pretrained_backbone": True},
]


@pytest.mark.parametrize("arguments", WEIGHTS)
def test_weights_must_be_named(arguments: dict[str, Any], folder: Path) -> None:
    """Any other true value makes torchvision download; it is refused with its place."""
    document: dict[str, Any] = experiment()
    document["model"] = {
        "class_type": "torch.nn:Sequential",
        "args": [{"func": "torchvision.models:resnet18", **arguments}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    with only_within(folder), pytest.raises(ConfigError, match=r"weights: DEFAULT|published"):
        ExperimentConfig.load("a.json")


def test_unknown_weights_are_an_error_of_the_file(folder: Path) -> None:
    """A name that torchvision does not know is an error with the path of the part."""
    document: dict[str, Any] = experiment()
    document["model"] = {"func": "torchvision.models:resnet18", "weights": "http://x"}
    with (
        only_within(folder),
        pytest.raises(ConfigError, match=r"^model: .*weights named 'http://x'"),
    ):
        build_experiment(ExperimentConfig.from_dict(document))


@pytest.mark.parametrize("field", ["name", "run_folder"])
@pytest.mark.parametrize("text", [*HOSTILE, ".", ".hidden", "a/.b"])
def test_run_folder_of_a_file_is_no_path(field: str, text: str, folder: Path) -> None:
    """The run folder and the name of a file refuse hostile text."""
    (folder / "a.json").write_text(json.dumps({**experiment(), field: text}))
    with only_within(folder), pytest.raises(ConfigError):
        ExperimentConfig.load("a.json")
    assert os.listdir(folder) == ["a.json"]


# --- links of data ---------------------------------------------------------------------------


def image_folder(root: Path) -> Any:
    return config_of(import_class("torchvision.datasets.folder:ImageFolder"), root=str(root))


def test_links_in_a_loop_are_refused(folder: Path) -> None:
    """An image folder whose links lead back, or multiply, is refused instead of walked for ever."""
    loop, tree, good = folder / "loop", folder / "tree", folder / "good"
    for number in range(12):
        (loop / f"class{number}").mkdir(parents=True)
        (loop / f"class{number}" / "back").symlink_to(loop)
        (tree / f"level{number}").mkdir(parents=True)
        for link in "abc":
            (tree / f"level{number}" / link).symlink_to(tree / f"level{number + 1}")
    for root in (loop, tree):
        with pytest.raises(ConfigError, match=r"root: .* without loops of links"):
            check_dataset_roots({"nested": [image_folder(root)]})
    (good / "cat").mkdir(parents=True)
    (good / "dog").symlink_to(good / "cat")
    check_dataset_roots(image_folder(good))
    check_dataset_roots(image_folder(folder / "missing"))
