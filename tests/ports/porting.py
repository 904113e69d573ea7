"""Comparison of a port: a public program's training as a plain torch loop and with the trainer.

A port is a module of this folder with three sections, each after a comment line:

- ``# Shared``: data, model, and functions that both trainings call.
- ``# Plain loop``: ``train_plainly(folder)``, with progress, evaluation and checkpoints in
  ``folder`` where the original has them; a second call resumes from the folder.
- ``# With the trainer``: ``build(run_folder, resume_from)``, which returns a trainer with a
  ``SaveCheckpoint`` hook, and ``state_of(trainer, run_folder)``.

Both call ``torch.manual_seed`` first. ``train_plainly`` and ``state_of`` return the final state as
a tree: weights, buffers, optimizer state, averages. Values below the key ``"metrics"`` are compared
up to rounding, everything else bit for bit. Lines are counted without imports and without what only
the comparison needs: ``state_of`` and the last statement of ``train_plainly``, its return.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sized
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeAlias, cast

import pytest
import torch
from torch.utils.data import Dataset, Sampler

from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.sinks import read_metrics

State: TypeAlias = dict[str, Any]

SECTIONS = ("Shared", "Plain loop", "With the trainer")
_LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER),
}


class Port(Protocol):
    """Module of a port."""

    __name__: str
    __file__: str | None

    def train_plainly(self, folder: Path, /) -> State:
        """Train in a plain loop and return the final state."""

    def build(self, run_folder: Path, resume_from: Any = None, /) -> HookBasedTrainer:
        """Return the trainer of the same training."""

    def state_of(self, trainer: HookBasedTrainer, run_folder: Path, /) -> State:
        """Return the final state of the trainer."""


class RandomImages(Dataset[torch.Tensor]):
    """Images of 3 x 8 x 8 random values from ``low`` to 1."""

    def __init__(self, images: int, low: float = 0.0) -> None:
        values = torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.images = low + (1 - low) * values

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


class EpochOrder(Sampler[int]):
    """Permutation that depends on the epoch only, as that of ``DistributedSampler``."""

    def __init__(self, data_source: Sized) -> None:
        self._samples, self._epoch = len(data_source), 0

    def __len__(self) -> int:
        return self._samples

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._epoch)
        return iter(torch.randperm(self._samples, generator=generator).tolist())


def train(port: Port, folder: Path, stops: Iterable[int] = ()) -> HookBasedTrainer:
    """Train with new objects after each stop, and return the last trainer.

    Args:
        port: module of the port.
        folder: run folder.
        stops: numbers of completed steps at which the trainer returns with a checkpoint.
    """
    resume_from = None
    for stop in (*stops, None):
        trainer = port.build(folder, resume_from)
        trainer.hooks += StopAfter(stop)
        if resume_from is not None:
            assert trainer.progress.global_step_id > 0
            torch.manual_seed(2**40)  # the resume has to restore the RNG
        trainer()
        if stop is not None:
            assert trainer.progress.global_step_id == stop
        resume_from = "auto"
    return trainer


def check_port(port: Port, folder: Path) -> None:
    """Compare the plain loop, the trainer, and the trainer stopped twice, on each rank of a job.

    The stops are after odd numbers of steps, within accumulation windows of even length. The plain
    loop has to restore its state from its checkpoint.
    """
    plain = folder / "plain"
    plain.mkdir(parents=True, exist_ok=True)
    expected = port.train_plainly(plain)
    trainer = train(port, folder / "straight")
    assert_same(port.state_of(trainer, folder / "straight"), expected)

    steps = trainer.progress.global_step_id
    resumed = train(port, folder / "resumed", (steps // 3 | 1, 2 * steps // 3 | 1))
    assert_same(port.state_of(resumed, folder / "resumed"), expected)
    assert_same(port.train_plainly(plain), expected)


def check_file(port: Port, folder: Path, precision: str = "no") -> None:
    """Compare the plain loop with the port's experiment file, stopped once, on each rank."""
    plain = folder / "plain"
    plain.mkdir(parents=True, exist_ok=True)
    expected = port.train_plainly(plain)
    experiment = ExperimentConfig.load(
        Path(str(port.__file__)).with_suffix(".yaml"),
        overrides={
            "run_folder": str(folder / "run"),
            "accelerator.mixed_precision": precision,
        },
        trust=[port.__name__, "porting"],
    )
    first = experiment.build().trainer
    first.hooks += StopAfter(7)
    first()
    resumed = experiment.build().trainer
    assert resumed.progress.global_step_id == 7
    resumed()
    assert_same(port.state_of(resumed, folder / "run"), expected)


def in_precision(port: Any, precision: str) -> Port:
    """Return a port whose ``train_plainly`` and ``build`` accept ``precision``, such as "bf16"."""
    functions = {
        "train_plainly": partial(port.train_plainly, precision=precision),
        "build": partial(port.build, precision=precision),
        "state_of": port.state_of,
    }
    made: Any = SimpleNamespace(**functions, __name__=port.__name__, __file__=port.__file__)
    return cast("Port", made)


class StopAfter(PipelineHooks):
    def __init__(self, steps: int | None) -> None:
        super().__init__("stop of a test")
        self._steps = steps
        self.on_step.after(self._stop)

    def _stop(self, args: PipelineHookArgs) -> None:
        if args.global_step_id + 1 == self._steps:
            args.requests.stop("a test stops the run", by=self.name)


def assert_same(found: Any, expected: Any, path: str = "state") -> None:
    """Compare two state trees bit for bit, and values below ``"metrics"`` up to rounding."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{path}: {type(found)}"
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        if not torch.equal(found, expected):
            distance = (found.double() - expected.double()).abs().max().item()
            raise AssertionError(f"{path} differs by up to {distance:.3g}")
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected) or set(found) == set(expected), path
        for key, value in expected.items():
            if key == "metrics":
                assert found[key] == pytest.approx(value, rel=1e-5), f"{path}.metrics"
            else:
                assert_same(found[key], value, f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, (mine, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(mine, other, f"{path}[{index}]")
    else:
        assert repr(found) == repr(expected), path


def code_lines(port: Port) -> dict[str, int]:
    """Count the lines with code in each section: no comments, docstrings and blank lines."""
    assert port.__file__ is not None
    text = Path(port.__file__).read_text("utf-8")
    lines = text.splitlines()
    starts = {name: lines.index(f"# {name}") + 1 for name in SECTIONS}
    assert sorted(starts.values()) == [*starts.values()], "sections are in another order"
    code = _lines_with_code(text)
    ends = [*list(starts.values())[1:], len(lines) + 1]
    return {
        name: sum(start < number < end for number in code)
        for (name, start), end in zip(starts.items(), ends, strict=True)
    }


def _lines_with_code(text: str) -> set[int]:
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())) | ast.FunctionDef(name="state_of"):
                left_out |= _lines_of(node)
            case ast.FunctionDef(name="train_plainly"):
                left_out |= _lines_of(node.body[-1])
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    rows = (range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in _LAYOUT)
    return {row for span in rows for row in span} - left_out


def _lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def trained_state(trainer: HookBasedTrainer) -> State:
    """Return the states of the model and of its optimizer, or of several optimizers by name."""
    model = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    states = {name: optimizer.state_dict() for name, optimizer in trainer.optimizers.items()}
    if states.keys() == {""}:
        return {"model": model, "optimizer": states[""]}
    return {"model": model, "optimizers": states}


def logged(path: Path, name: str) -> dict[int, float]:
    """Return the values of a metric in a metrics file, by completed steps."""
    values = (value for record in read_metrics(path) for value in record.values)
    return {value.step: value.value for value in values if value.name == name}
