"""The file with the best weights, also across a resume."""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from published import NAME, Evaluated, Logged
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.hooks.keep_best import KeepBest, KeepBestConfig
from robo_orchard_lab.pipeline.metrics import UnknownMetricError
from robo_orchard_lab.pipeline.run.durable import temporary_name
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from tiny import make_trainer

NAN, INF = math.nan, math.inf
FILE = "best.safetensors"

# mode, min_delta, a value for each step, the steps after which a file is written
TABLE: dict[str, tuple[str, float, list[float | None], list[int]]] = {
    "falling": ("min", 0, [3, 2, 1], [1, 2, 3]),
    "rising": ("min", 0, [1, 2, 3], [1]),
    "max": ("max", 0, [1, 3, 2, 4, 4], [1, 2, 4]),
    "a tie is no better": ("max", 0, [1, 1, 1], [1]),
    "delta": ("min", 0.5, [3, 2.6, 2.5, 2.4, 2, 1.95], [1, 4]),
    "NaN": ("min", 0, [NAN, 3, NAN, 2, NAN], [2, 4]),
    "nothing but NaN": ("max", 0, [NAN, NAN], []),
    "inf is the worst": ("min", 0, [INF, 5, INF, 4], [2, 4]),
    "inf is never the best": ("max", 0.1, [-INF, 1, INF, INF, 2], [2, 5]),
    "-inf is never the best": ("min", 0, [-INF, 2, -INF, 1], [2, 4]),
    "now and then": ("max", 0, [None, 1, None, 0, None, 2], [2, 6]),
}
SOURCES = {"logged": Logged, "evaluated": Evaluated}


class Snapshots(PipelineHooks):
    """Hook that records the weights at the end of each step."""

    def __init__(self) -> None:
        super().__init__("snapshots")
        self.after_step: dict[int, dict[str, torch.Tensor]] = {}
        self.on_optimizer_step.after(self._note)

    def _note(self, args: PipelineHookArgs) -> None:
        state = args.model.state_dict()
        self.after_step[args.progress.steps_done] = {n: t.clone() for n, t in state.items()}


class Run:
    """One run of a case, with the file in its own folder."""

    def __init__(self, case: str, folder: Path, source: str = "logged", **options: Any) -> None:
        mode, min_delta, self.values, self.writes = TABLE[case]
        self.file = folder / FILE
        self.keep = KeepBestConfig(monitor=NAME, mode=mode, min_delta=min_delta, path=self.file)()  # type: ignore[arg-type]  # from a table
        self.snapshots = Snapshots()
        self.saves: list[int] = []
        listen = PipelineHooks("listens")
        listen.on_loop.before(self._listen)
        options = {"max_step": len(self.values), **options}
        hooks = [self.keep, listen, self.snapshots, SOURCES[source](self.values)]
        self.trainer: HookBasedTrainer = make_trainer(hooks, **options)

    def _listen(self, args: PipelineHookArgs) -> None:
        progress = args.progress
        args.requests.listen(
            lambda request: (
                self.saves.append(progress.steps_done) if request.by == "KeepBest" else 0
            )
        )

    def __call__(self) -> None:
        with suppress(UnknownMetricError):  # no value yet
            self.trainer()

    def metadata(self) -> dict[str, str] | None:
        if not self.file.exists():
            return None
        with safe_open(self.file, framework="pt") as file:
            return dict(file.metadata())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", TABLE)
def test_file_has_the_best_weights(case: str, source: str, tmp_path: Path) -> None:
    """The file has the weights of the best value, and metadata about the value."""
    run = Run(case, tmp_path, source)
    run()
    assert run.saves == run.writes
    if not run.writes:
        assert not run.file.exists()
        assert run.keep.best_value is None
        return
    step = run.writes[-1]
    assert (run.keep.best_value, run.keep.best_step) == (run.values[step - 1], step)
    found, expected = load_file(run.file), run.snapshots.after_step[step]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert run.metadata() == {
        "monitor": NAME,
        "mode": TABLE[case][0],
        "value": repr(float(run.keep.best_value or 0)),
        "value_step": str(step),
        "epoch_id": "0",
        "global_step_id": str(step),
        "optimizer_step_id": str(step),
        "format": "pt",  # required by transformers
    }


@pytest.mark.parametrize("later", [False, True], ids=["as saved", "newer file"])
@pytest.mark.parametrize("case", TABLE)
def test_resumed_run_ends_with_the_same_file(case: str, later: bool, tmp_path: Path) -> None:
    """A run saved after any step, and possibly continued beyond, ends with the same file."""
    uninterrupted = Run(case, tmp_path / "uninterrupted")
    uninterrupted()
    for step in range(1, len(uninterrupted.values)):
        folder = tmp_path / str(step)
        first = Run(case, folder, max_step=step)
        first()
        first.trainer.save_checkpoint(folder / "saved")
        if later and uninterrupted.file.exists():
            shutil.copy(uninterrupted.file, folder)
        resumed = Run(case, folder, resume_from=folder / "saved")
        resumed()
        assert resumed.metadata() == uninterrupted.metadata()
        assert resumed.keep.best_value == uninterrupted.keep.best_value
        assert resumed.keep.best_step == uninterrupted.keep.best_step
        if later:
            assert resumed.saves == []
        else:
            assert first.saves + resumed.saves == uninterrupted.saves


def test_resumed_run_logs_the_state_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A better file is kept; a missing or unreadable file causes a warning."""
    caplog.set_level(logging.INFO, "robo_orchard_lab.pipeline.hooks.keep_best")
    first = Run("rising", tmp_path, max_step=1)
    first()
    first.trainer.save_checkpoint(tmp_path / "saved")

    def logged() -> list[str]:
        caplog.clear()
        Run("rising", tmp_path, resume_from=tmp_path / "saved")()
        return [record.getMessage() for record in caplog.records]

    assert logged() == []
    keep = KeepBestConfig(monitor=NAME, mode="min", path=first.file)
    make_trainer([keep, Logged([0.25])], max_step=1)()
    assert logged() == [
        f"KeepBest: keeping {first.file} with {NAME} 0.2500 (step 1), better than the resumed "
        "run's best value"
    ]
    warning = (
        f"KeepBest: {first.file} lacks the best weights of the resumed run ({NAME} 1.0000); the "
        "next better value overwrites the file"
    )
    first.file.write_bytes(b"something else")
    assert logged() == [warning]
    first.file.unlink()
    assert logged() == [warning]
    make_trainer([keep.replace(mode="max"), Logged([9])], max_step=1)()
    assert logged() == [warning]


def test_new_run_overwrites_an_old_file(tmp_path: Path) -> None:
    """The first value of a new run is the best; leftovers of a killed run are removed."""
    Run("falling", tmp_path)()
    run = Run("rising", tmp_path, max_step=1)
    left = run.file.with_name(temporary_name(FILE))
    left.touch()
    run()
    assert not left.exists()
    metadata = run.metadata()
    assert metadata is not None
    assert (metadata["value"], metadata["global_step_id"]) == ("1.0", "1")


def test_weights_are_of_the_publishing_step(tmp_path: Path) -> None:
    """The value is judged before the logging point, while its weights are there."""
    hooks = PipelineHooks("publishes")
    publish = hooks.on_step.after(when="at steps 2")
    publish(lambda args: args.metrics.publish(NAME, 1.0))
    hooks.register_at_commit(lambda args: args.requests.log("it is time"), "5 steps")
    cfg = KeepBestConfig(monitor=NAME, mode="min", path=tmp_path / FILE)
    make_trainer([cfg, hooks], max_step=7)()
    with safe_open(tmp_path / FILE, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["value_step"], metadata["global_step_id"]) == ("2", "2")


class OtherWeights(PipelineHooks):
    """Hook that keeps one tensor as its weights."""

    def __init__(self) -> None:
        super().__init__("averaged")
        self.on_loop.before(lambda args: args.run.weight_sets.update({self.name: self}))

    def applied(self) -> Any:
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        return {"averaged": torch.arange(3.0)}


@pytest.mark.parametrize("first", [False, True])
def test_weights_of_another_hook_are_saved(first: bool, tmp_path: Path) -> None:
    """The weights of the named hook are saved, in any order of registration."""
    keep = KeepBestConfig(monitor=NAME, mode="min", path=tmp_path / FILE, weights="averaged")
    pair: list[Any] = [OtherWeights(), keep] if first else [keep, OtherWeights()]
    make_trainer([*pair, Logged([1])], max_step=1)()
    assert load_file(tmp_path / FILE)["averaged"].tolist() == [0, 1, 2]


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    """The error comes before the first step, with the hook and a suggestion."""
    keep = KeepBestConfig(monitor=NAME, mode="min", path=tmp_path / FILE, weights="averages")
    trainer = make_trainer([keep, OtherWeights(), Logged([1])], max_step=1)
    with pytest.raises(PipelineConfigError, match=r"'averages'.*did you mean 'averaged'") as raised:
        trainer()
    assert "KeepBest" in "".join(raised.value.__notes__)
    assert trainer.progress.global_step_id == 0


def test_two_hooks_write_different_files(tmp_path: Path) -> None:
    """Hooks with different names monitor different metrics and write different files."""
    lowest = KeepBestConfig(monitor=NAME, mode="min", path=tmp_path / "lowest.safetensors")
    highest = KeepBestConfig(
        monitor="eval/test/accuracy", mode="max", path=tmp_path / "new" / "highest.safetensors"
    )
    sources = [Logged([3, 2, 4]), Logged([1, 2, 3], "eval/test/accuracy")]
    both = PipelineHooks.from_hooks({"lowest": lowest, "highest": highest})
    make_trainer([both, *sources], max_step=3)()
    steps = {}
    for path in (lowest.path, highest.path):
        with safe_open(path, framework="pt") as file:
            steps[path.stem] = file.metadata()["global_step_id"]
    assert steps == {"lowest": "2", "highest": "3"}


def test_saves_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each written file has a log line."""
    caplog.set_level(logging.INFO, "robo_orchard_lab.pipeline.trainer.commit")
    run = Run("falling", tmp_path, max_step=1)
    run()
    assert [record.getMessage() for record in caplog.records] == [
        f"saved {run.file}: {NAME} is 3.0000, the best so far, requested by KeepBest"
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_unknown_metric_is_refused(source: str, tmp_path: Path) -> None:
    """The error names the hook and suggests a published name."""
    keep = KeepBestConfig(monitor="eval/val/los", mode="min", path=tmp_path / FILE)
    trainer = make_trainer([keep, SOURCES[source]([1, 2])], max_step=2)
    with pytest.raises(
        UnknownMetricError,
        match=r"no metric 'eval/val/los' .*which KeepBest waits for; did you mean 'eval/val/loss'",
    ):
        trainer()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "best.pt"}, r"expected a file name ending in \.safetensors, got 'best.pt'"),
        ({"path": ""}, "ending in"),
        ({"min_delta": -1}, "min_delta"),
        ({"mode": "least"}, "mode"),
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """Fields out of range and files with another suffix are refused."""
    with pytest.raises(ValidationError, match=message):
        KeepBestConfig(**{"monitor": NAME, "mode": "min", "path": FILE, **fields})


@pytest.mark.parametrize("kind", ["json", "yaml", "toml"])
def test_config_round_trips(kind: Any) -> None:
    """The config, its path included, round-trips in every format."""
    cfg = KeepBestConfig(monitor=NAME, mode="min", path=Path("out") / FILE, min_delta=0.1)
    assert KeepBestConfig.from_str(cfg.to_str(kind), kind) == cfg


def test_state_of_another_version_is_refused() -> None:
    """The error names the hook and both versions."""
    keep = KeepBestConfig(monitor=NAME, mode="min", path=Path(FILE))()
    with pytest.raises(StateError, match="KeepBest of version 1, found version 2"):
        keep.load_state_dict({"version": 2})


def test_hook_does_not_affect_training(tmp_path: Path) -> None:
    """The hook reads no tensors, changes no weights and restores its state."""
    values = [3.0, NAN, 3.0, 2.0, 2.0, 1.0]

    def keep() -> KeepBest:
        path = tmp_path / FILE
        path.unlink(missing_ok=True)  # independent of an earlier run
        return KeepBestConfig(monitor=NAME, mode="min", path=path)()

    for source in SOURCES.values():
        extra_hooks = [partial(source, values)]
        assert_no_device_sync(keep, extra_hooks=extra_hooks)
        assert_weights_unchanged(keep, extra_hooks=extra_hooks)
        assert_state_round_trip(keep, extra_hooks=extra_hooks)


def test_hook_unsubscribes_after_the_run(tmp_path: Path) -> None:
    """After the run, the hook receives no values."""
    run = Run("falling", tmp_path)
    run()
    run.trainer.metrics.publish(NAME, -1, reduce="last")
    run.trainer.metrics.flush(log=True)
    assert run.keep.best_value == 1


def test_unusable_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    """The error comes before the first step, with the hook and the field."""
    (tmp_path / "file").touch()
    config = KeepBestConfig(
        monitor="eval/val/loss", mode="min", path=tmp_path / "file" / "best.safetensors"
    )
    with pytest.raises(PipelineConfigError, match=r"KeepBest\.path: can't create the folder"):
        make_trainer([config], max_step=1)()
