"""Any file loads as an experiment or is refused with a ConfigError."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.experiment.hostile.corpus import experiment
from tests.experiment.hostile.texts import JSON_AND_TOML, YAML

from robo_orchard_core.utils.config import ConfigError, formats
from robo_orchard_core.utils.config.formats import Plain
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.catalogue import ExperimentTrust
from robo_orchard_lab.experiment.document import read_experiment
from robo_orchard_lab.experiment.overrides import from_arguments, from_environment
from robo_orchard_lab.experiment.prevalidation import prevalidate

TRUST = ExperimentTrust(("trusted_parts",)).trust

HARMLESS = formats.read(experiment(), "yaml")
TEXTS = [each.content for each in (*YAML, *JSON_AND_TOML) if len(each.content) < 2000]
PIECES = [
    *(text if isinstance(text, bytes) else text.encode() for text in TEXTS),
    *(b"[ ] { } : - , \n \r \t & * ! !! # | > ' \" % @ ` ? << ~ \\ \0 \xff \xc0\xae".split(b" ")),
]

WITHIN = [
    "class_type",
    "func",
    "config_type",
    "groups",
    "evaluation",
    "train",
    "sinks",
    "trackers",
    "collate_fn",
]
KEYS = st.sampled_from(
    [
        *ExperimentConfig.model_fields,
        *WITHIN,
        "base",
        "trust",
        "$schema",
        "",
        ".",
        "__class__",
        "a.b",
        "\x1b",
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        [
            "os:system",
            "MLP",
            "torch.optim:SGD",
            "trusted_parts:Net",
            "trusted_parts:f.__globals__",
            "TrackerSink",
            "wandb",
            "auto",
            "experiment.yaml",
            "other.yaml",
            "..",
            "/etc",
        ]
    )
)
VALUES: st.SearchStrategy[Plain] = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty current folder."""
    path, before = tmp_path_factory.mktemp("generated"), Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def is_admitted(content: bytes, suffix: str) -> bool:
    """Return True if a file passes, after checking that any error is a ConfigError."""
    file = Path(f"experiment.{suffix}")
    file.write_bytes(content)
    try:
        prevalidate(read_experiment(file), TRUST)
    except ConfigError as error:
        text = str(error)
        assert text.startswith(str(file))
        assert all(line.isprintable() for line in text.split("\n"))  # one line for each error
        assert len(text) < 1000
        return False
    return True


@given(st.binary(max_size=300), st.sampled_from(["yaml", "json", "toml"]))
def test_random_bytes_are_refused(content: bytes, suffix: str) -> None:
    """Random bytes are refused."""
    assert not is_admitted(content, suffix)


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from(["yaml", "json", "toml"]))
def test_pieces_of_hostile_files_are_handled(pieces: list[bytes], suffix: str) -> None:
    """Hostile pieces in any order pass or are refused."""
    is_admitted(b"".join(pieces), suffix)


@given(st.integers(0, len(experiment())), st.integers(0, 40), st.sampled_from(PIECES))
def test_a_damaged_harmless_file_is_handled(start: int, cut: int, piece: bytes) -> None:
    """A harmless file with a damaged or inserted part passes or is refused."""
    text = experiment().encode()
    is_admitted(text[:start] + piece + text[start + cut :], "yaml")


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_fields_with_any_values_are_handled(changes: dict[str, Plain]) -> None:
    """Any values of any fields pass or are refused, and passing files name only trusted code."""
    document = {**HARMLESS, **changes}
    text = json.dumps(document)
    if is_admitted(text.encode(), "json"):
        assert "os:system" not in _named(document)
        assert not {"trust", "__class__", "a.b"} & document.keys()


def _named(value: Plain) -> set[str]:
    """Return all names of code in a value."""
    found: set[str] = set()
    if isinstance(value, dict):
        found.update(str(name) for key, name in value.items() if key in PART_KEYS)
        value = [*value.values()]
    return found.union(*map(_named, value if isinstance(value, list) else []))


@given(st.lists(st.text(max_size=30) | KEYS, max_size=4), st.text(max_size=30))
def test_any_overrides_are_handled(keys: list[str], text: str) -> None:
    """Overrides from the command line and the environment pass or are refused."""
    Path("experiment.yaml").write_text(experiment())
    with contextlib.suppress(ConfigError):
        found, _ = from_arguments([f"--{'.'.join(keys)}={text}"])
        prevalidate(read_experiment("experiment.yaml", overrides=found), TRUST)
    with contextlib.suppress(ConfigError):
        name = "__".join(["ROBO_ORCHARD_LAB", *keys])
        found = from_environment({name: text}, HARMLESS)
        prevalidate(read_experiment("experiment.yaml", overrides=found), TRUST)


RICH = """
seed: 1
model:
  class_type: torch.nn:Sequential
  args: [{class_type: torch.nn:Linear, in_features: 2, out_features: 3}]
data:
  train: {dataset: {class_type: Spirals, size: 8}, batch_size: 4, shuffle: true}
  evaluation: {val: {dataset: {class_type: Spirals, seed: 1}}}
  order: {keyed_by: sample}
batch_processor: {class_type: SupervisedProcessor, loss: {class_type: torch.nn:MSELoss}}
optimizer:
  class_type: torch.optim:AdamW
  betas: [0.9, 0.99]
  groups: {a: {parameters: norms_and_biases, weight_decay: 0}, b: {parameters: ["*"], lr: 1}}
lr_scheduler:
  class_type: torch.optim.lr_scheduler:SequentialLR
  schedulers: [{class_type: torch.optim.lr_scheduler:OneCycleLR, max_lr: 1, total_steps: auto}]
  milestones: [3]
hooks:
  log: {class_type: MetricsLogger, every: 5 steps, sinks: {a: {class_type: JsonLinesSink, path: a}}}
  stop: {class_type: TimeLimit, limit: 3 h}
  signals: {class_type: Preemption, signals: [SIGTERM]}
  best: {class_type: KeepBest, monitor: a, mode: min, path: a.safetensors}
trainer: {max_epoch: 1}
accelerator: {mixed_precision: "no", cpu: true}
checkpoint: {every: 1 epoch, keep_last: 2}
resume: never
"""


def _changed(value: Plain, draw: st.DrawFn) -> Plain:
    """Return the value with one random change."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        renamed = draw(KEYS) if draw(st.integers(0, 9)) == 0 else key
        return {
            renamed if k == key else k: _changed(v, draw) if k == key else v
            for k, v in value.items()
        }
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [_changed(v, draw) if i == at else v for i, v in enumerate(value)]
    return draw(VALUES)


@st.composite
def changed_experiments(draw: st.DrawFn) -> Plain:
    """Return a rich experiment with a few changed values or names."""
    document: Plain = formats.read(RICH, "yaml")
    for _ in range(draw(st.integers(1, 3))):
        document = _changed(document, draw)
    return document


def test_a_rich_experiment_round_trips() -> None:
    """The unchanged rich experiment loads and round-trips."""
    Path("rich.yaml").write_text(RICH)
    check_round_trip(ExperimentConfig.load("rich.yaml"))


@given(changed_experiments())
def test_any_fields_are_validated_or_refused(document: Plain) -> None:
    """Any changed fields are validated or refused, also with trusted names."""
    Path("experiment.json").write_text(json.dumps(document))
    try:
        experiment = ExperimentConfig.load("experiment.json")
    except ConfigError:
        return
    check_round_trip(experiment)


def check_round_trip(experiment: ExperimentConfig) -> None:
    """Check that a saved experiment loads as an equal value with the same trust."""
    experiment.save("again.json")
    assert ExperimentConfig.load("again.json") == experiment
