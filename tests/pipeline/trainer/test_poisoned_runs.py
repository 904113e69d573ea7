"""Runs whose weights become non-finite: saves, best weights, and resumes."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, load_checkpoint
from robo_orchard_lab.pipeline.checkpoint.state_tree import encode_state
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineConfigError, RunPreempted
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    NonFiniteGuardConfig,
    PreemptionConfig,
    SaveCheckpointConfig,
    SaveModelConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.hooks.non_finite_guard import NonFiniteError
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, read_metrics
from tiny import loss_of, make_loader, make_model, make_trainer

NAN = math.nan


class Poison(PipelineHooks):
    """Hook that spoils a tensor of the run after the update of one step."""

    def __init__(self, at: int, where: Literal["weight", "optimizer", "buffer"] = "weight") -> None:
        super().__init__("Poison")
        self.at = at
        self.where = where
        self.on_optimizer_step.after(self._spoil)

    def _spoil(self, args: PipelineHookArgs) -> None:
        if args.progress.steps_done != self.at:
            return
        parameter = next(args.model.parameters())
        target: Any = parameter.data
        if self.where == "optimizer":
            assert args.optimizer is not None
            target = args.optimizer.state[parameter]["momentum_buffer"]
        if self.where == "buffer":
            target = dict(args.model.named_buffers())["1.running_var"]
        target.view(-1)[0] = math.inf if self.where == "buffer" else NAN


class Accuracy(PipelineHooks):
    """Hook that publishes the rising metric ``accuracy`` after each step."""

    def __init__(self) -> None:
        super().__init__("Accuracy")
        self.on_step.after(
            lambda args: args.metrics.publish("accuracy", float(args.progress.steps_done))
        )


class Masked(torch.nn.Module):
    """Module with an infinite mask and running statistics, both persistent buffers."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mask.exp()


def masked_model() -> torch.nn.Module:
    return torch.nn.Sequential(make_model(), torch.nn.BatchNorm1d(2), Masked())


def make_run(folder: Path, *hooks: Any, **options: Any) -> HookBasedTrainer:
    model = options.pop("model", None) or make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options.setdefault("max_step", 6)
    return make_trainer(hooks, model=model, optimizer=optimizer, run_folder=folder, **options)


def saved_steps(folder: Path) -> dict[int, tuple[str, ...] | None]:
    """Return the non-finite names of each checkpoint, by step."""
    return {i.step: i.non_finite for i in CheckpointStore(folder / "checkpoints").list()}


EACH = SaveCheckpointConfig(every="1 step", keep_last=None)


@pytest.mark.parametrize("background", [False, True])
def test_unguarded_run_keeps_a_healthy_checkpoint_and_resumes_from_it(
    background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run warns at each poisoned save, keeps the last healthy one, and resumes there."""
    saver = SaveCheckpointConfig(every="1 step", keep_last=2, in_background=background)
    make_run(tmp_path, saver, LossTrackerConfig(), Poison(4))()
    found = saved_steps(tmp_path)
    assert {step: bool(names) for step, names in found.items()} == {3: False, 5: True, 6: True}
    assert "step_00000004 has non-finite values in model/0.weight;" in caplog.text
    state = read_run_state(tmp_path)
    assert state.checkpoint is not None
    assert state.checkpoint.non_finite is not None
    assert "model/0.weight" in state.checkpoint.non_finite

    caplog.clear()
    resumed = make_run(tmp_path, saver, LossTrackerConfig(), Poison(0), resume_from="auto")
    assert resumed.progress.global_step_id == 3
    assert "skipped" in caplog.text
    assert "step_00000006 has non-finite values in" in caplog.text
    resumed()
    assert not any(saved_steps(tmp_path).values())
    straight = make_run(tmp_path / "straight", saver, LossTrackerConfig(), Poison(0))
    straight()
    for one, other in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("weight", "model/0.0.weight"),
        ("optimizer", "optimizer/state.0.0.weight.momentum_buffer"),
        ("buffer", "model/1.running_var"),
    ],
)
def test_verdict_covers_weights_statistics_and_optimizer(
    where: Literal["weight", "optimizer", "buffer"], name: str, tmp_path: Path
) -> None:
    """The first poisoned checkpoint names the tensor; a mask with infinities is no poison."""
    make_run(tmp_path, EACH, Poison(3, where), model=masked_model(), max_step=3)()
    assert saved_steps(tmp_path) == {1: (), 2: (), 3: (name,)}


def test_losses_are_those_since_the_last_checkpoint(tmp_path: Path) -> None:
    """A NaN loss whose update is skipped is recorded once, and its checkpoint stays healthy."""
    batches = [tuple(part.clone() for part in batch) for batch in make_loader()]
    batches[2][0][0, 0] = NAN
    guard = NonFiniteGuardConfig(policy="skip")
    saver = SaveCheckpointConfig(every="2 steps", keep_last=None)
    make_run(tmp_path, saver, guard, LossTrackerConfig(), loader=batches)()
    assert saved_steps(tmp_path) == {2: (), 4: ("losses",), 6: ()}
    resumed = make_run(
        tmp_path, saver, guard, LossTrackerConfig(), loader=batches, resume_from="auto"
    )
    assert resumed.progress.global_step_id == 6


def test_resume_without_a_healthy_checkpoint_needs_a_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resuming by "auto" is an error if all are poisoned; an explicit path resumes and warns."""
    saver = SaveCheckpointConfig(every="3 steps")
    make_run(tmp_path, saver, Poison(1))()
    with pytest.raises(CheckpointError, match="finite weights"):
        make_run(tmp_path, saver, Poison(0), resume_from="auto")
    assert read_run_state(tmp_path).state == "failed"
    caplog.clear()
    path = tmp_path / "checkpoints" / "step_00000003"
    assert make_run(tmp_path, saver, Poison(0), resume_from=path).progress.global_step_id == 3
    assert "which has non-finite values in model/0.weight" in caplog.text


@pytest.mark.parametrize("weights", [None, "EMA"])
def test_best_weights_are_finite(
    weights: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a metric that still rises, the best weights are the last finite ones."""
    file = tmp_path / "best.safetensors"
    keep = KeepBestConfig(monitor="accuracy", mode="max", path=file, weights=weights)()
    saver = SaveCheckpointConfig(
        every=None, keep_last=1, keep_best=1, monitor="accuracy", mode="max"
    )
    make_run(tmp_path, Accuracy(), EMAConfig(decay=0.5), saver, keep, Poison(4))()
    assert (keep.best_value, keep.best_step) == (3.0, 3)
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert "0.weight of the weights is not finite; the weights are not kept" in caplog.text
    assert [step for step, names in saved_steps(tmp_path).items() if not names] == [3]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000003"


def test_exported_model_is_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SaveModel keeps the last finite weights, and logs an error instead of writing."""
    make_run(tmp_path, SaveModelConfig(every="1 step"), Poison(4))()
    file = tmp_path / "pretrained_model" / "model.safetensors"
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert [r.levelno for r in caplog.records if "is not written" in r.message] == [
        logging.ERROR
    ] * 3


def test_open_gradients_are_covered(tmp_path: Path) -> None:
    """A checkpoint within a window whose gradients are NaN is poisoned; the one before is not."""
    batches = [tuple(part.clone() for part in batch) for batch in make_loader()]
    batches[2][0][0, 0] = NAN
    make_run(tmp_path, EACH, loader=batches, accumulate=2, max_step=4)()
    found = saved_steps(tmp_path)
    assert (found[1], found[2]) == ((), ())
    assert found[3] is not None
    assert found[3][0] == "state/own_gradients.0.weight"


class WeightsRequested(PipelineHooks):
    """Hook that requests a file of weights and a written file at each step."""

    def __init__(self, folder: Path) -> None:
        super().__init__("WeightsRequested")
        self.written: list[int] = []
        self.folder = folder
        self.register_at_commit(self._request, "1 step")

    def _request(self, args: PipelineHookArgs) -> None:
        step = args.progress.steps_done
        args.requests.save_weights(self.folder / f"{step}.safetensors", "each step")
        args.requests.write(lambda: self.written.append(step), "each step")


@pytest.mark.parametrize("read", ["one update late", "at logging points"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_guard_reads_the_last_update_before_a_save(
    accumulate: int, read: Any, tmp_path: Path
) -> None:
    """A guard that reads late fails before any file holds the bad update."""
    batches = [tuple(part.clone() for part in batch) for batch in make_loader()]
    batches[3][0][0, 0] = NAN
    requests = WeightsRequested(tmp_path)
    hooks = [EACH, NonFiniteGuardConfig(read=read), requests]
    with pytest.raises(NonFiniteError, match="loss"):
        make_run(tmp_path, *hooks, loader=batches, accumulate=accumulate)()
    assert saved_steps(tmp_path) == {1: (), 2: (), 3: ()}
    assert requests.written == [1, 2, 3]
    assert {int(file.stem) for file in tmp_path.glob("*.safetensors")} == {1, 2, 3}


@pytest.mark.parametrize("read", ["one update late", "at logging points"])
def test_guard_reads_the_last_update_before_the_save_of_a_stop(read: Any, tmp_path: Path) -> None:
    """A stop right after a bad update, as on a signal, saves nothing of it."""
    batches = [tuple(part.clone() for part in batch) for batch in make_loader()]
    batches[3][0][0, 0] = NAN
    stopping = PipelineHooks("stopping")

    @stopping.on_step.after(when="at steps 4")
    def stop(args: PipelineHookArgs) -> None:
        args.requests.save("a signal")
        args.requests.stop("a signal", exit_code=143)

    saver = SaveCheckpointConfig(every="2 steps")
    with pytest.raises(NonFiniteError):
        make_run(tmp_path, saver, NonFiniteGuardConfig(read=read), stopping, loader=batches)()
    assert saved_steps(tmp_path) == {2: ()}
    state = json.loads((tmp_path / "run_state.json").read_text())
    assert (state["state"], state["error"]["type"]) == ("failed", "NonFiniteError")


# --- rollback --------------------------------------------------------------------------------


class Glitch:
    """Processor whose loss is NaN at some calls, as of a fault that does not come again."""

    def __init__(self, *calls: int) -> None:
        self.calls = set(calls)
        self.count = 0

    def __call__(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, loss = loss_of(model, batch)
        outputs = torch.nn.functional.dropout(outputs)  # draws from torch's RNG
        self.count += model.training  # not in an evaluation
        if not model.training:
            return outputs, loss
        return outputs, (loss + outputs.mean()) * (NAN if self.count in self.calls else 1.0)


def rolled_back(folder: Path) -> list[tuple[int, int]]:
    """Return the steps of all rollbacks in ``run_state.json``."""
    return [(each.from_step, each.to_step) for each in read_run_state(folder).rollbacks]


def run_with(
    folder: Path, glitch: Glitch, guard: NonFiniteGuardConfig, **options: Any
) -> HookBasedTrainer:
    """Make a run of 18 steps in epochs of 7, with state in all kinds of hooks."""
    model = torch.nn.Sequential(make_model(), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    save = options.pop("save", "4 steps")
    validation = ValidationHookConfig(every="3 steps")(dataloaders={"val": make_loader(2)})
    sinks = [JsonLinesSinkConfig(path=str(folder / "metrics.jsonl"))]
    torch.manual_seed(5)
    return make_trainer(
        [
            guard,
            SaveCheckpointConfig(every=save, keep_last=None, in_background=True),
            PreemptionConfig(),
            LossTrackerConfig(),
            EMAConfig(decay=0.5),
            validation,
            KeepBestConfig(monitor="eval/val/loss", mode="min", path=folder / "best.safetensors"),
            MetricsLoggerConfig(every="2 steps", sinks=sinks),
        ],
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
        loader=make_loader(shuffle=True),
        batch_processor=SimpleBatchProcessor.from_callable(glitch),
        max_step=18,
        run_folder=folder,
        **options,
    )


def final_state(folder: Path) -> list[torch.Tensor]:
    """Return all tensors of the last checkpoint, and the best weights."""
    saved = load_checkpoint(folder / "checkpoints" / "step_00000018")
    rank = {**saved.rank_parts["state"]}
    hooks = {**rank["hooks"]}
    del hooks["NonFiniteGuard"]  # counts the rollbacks
    _, tensors = encode_state({**saved.parts, **rank, "hooks": hooks})
    return [*tensors.values(), *load_file(folder / "best.safetensors").values()]


@pytest.mark.parametrize(
    ("read", "accumulate", "glitch", "steps"),
    [
        ("now", 1, [6], [(6, 4)]),
        ("now", 1, [14, 17], [(14, 12), (15, 12)]),
        ("now", 2, [10], [(11, 8)]),
        ("one update late", 1, [6], [(7, 4)]),
        ("one update late", 1, [8], [(8, 4)]),  # found by the save of step 8
        ("one update late", 2, [13], [(14, 12)]),  # found in a short window
        ("one update late", 1, [18], [(18, 16)]),  # found by the save at the end
    ],
)
def test_run_after_a_rollback_equals_an_uninterrupted_run(
    read: Any, accumulate: int, glitch: list[int], steps: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Weights, all states, best weights and metrics are those of a run without the fault."""
    guard = NonFiniteGuardConfig(then="rollback", read=read)
    run = run_with(tmp_path / "faulty", Glitch(*glitch), guard, accumulate=accumulate)
    run()
    straight = run_with(tmp_path / "straight", Glitch(), guard, accumulate=accumulate)
    straight()
    assert rolled_back(tmp_path / "faulty") == steps
    assert run.progress == straight.progress
    found, expected = final_state(tmp_path / "faulty"), final_state(tmp_path / "straight")
    assert len(found) == len(expected) > 40
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    metrics = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("faulty", "straight")]
    assert metrics[0] == metrics[1]
    assert not any(saved_steps(tmp_path / "faulty").values())


@pytest.mark.parametrize("read", ["now", "one update late"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rollback_without_the_batch_equals_a_run_that_skips_it(
    accumulate: int, read: Any, tmp_path: Path
) -> None:
    """With ``skip_batch``, the weights are those of a plain loop without the bad windows."""
    batches: list[Any] = [tuple(part.clone() for part in batch) for batch in make_loader(8)]
    for index in (4, 6):
        batches[index][0][0, 0] = NAN
    model = torch.nn.Sequential(make_model(), torch.nn.BatchNorm1d(2))
    plain = copy.deepcopy(model)
    guard = NonFiniteGuardConfig(then="rollback", read=read, skip_batch=True)
    saver = SaveCheckpointConfig(every="2 steps")
    options: Any = {"model": model, "loader": batches, "accumulate": accumulate, "max_step": 8}
    run = make_run(tmp_path, saver, guard, **options)
    run()
    assert run.progress.skipped_optimizer_steps == 2
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for begin in range(0, 8, accumulate):
        window = batches[begin : begin + accumulate]
        if all(inputs.isfinite().all() for inputs, _ in window):
            for batch in window:
                (loss_of(plain, batch)[1] / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-6)
    resumed = make_run(tmp_path, saver, guard, **options, resume_from="auto")
    assert resumed.progress.global_step_id == 8


def test_skips_in_a_row_lead_to_a_rollback(tmp_path: Path) -> None:
    """After the most skips allowed, the run goes back and leaves all of their batches out."""
    batches: list[Any] = [tuple(part.clone() for part in batch) for batch in make_loader()]
    for index in (3, 4, 5):
        batches[index][0][0, 0] = NAN
    guard = NonFiniteGuardConfig(
        policy="skip", max_skips_in_a_row=2, then="rollback", skip_batch=True
    )
    run = make_run(tmp_path, EACH, guard, loader=batches, max_step=7)
    run()
    assert rolled_back(tmp_path) == [(6, 5)]
    assert (run.progress.optimizer_step_id, run.progress.skipped_optimizer_steps) == (4, 3)


class PoisonOnce(Poison):
    """Poison that a repetition of the step does not meet."""

    def _spoil(self, args: PipelineHookArgs) -> None:
        super()._spoil(args)
        if args.progress.steps_done == self.at:
            self.at = -1


def test_rollback_leaves_poisoned_checkpoints_behind(tmp_path: Path) -> None:
    """Poisoned weights with finite gradients are saved as such, and not the way back."""
    guard = NonFiniteGuardConfig(then="rollback")
    run = make_run(tmp_path, EACH, guard, PoisonOnce(4))
    run()
    assert rolled_back(tmp_path) == [(5, 3)]
    assert not any(saved_steps(tmp_path).values())
    straight = make_run(tmp_path / "straight", EACH, guard, Poison(0))
    straight()
    for one, other in zip(run.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_update_that_spoilt_the_weights_is_left_out(tmp_path: Path) -> None:
    """A rollback skips an update that made weights non-finite with finite gradients."""
    guard = NonFiniteGuardConfig(
        policy="skip", max_skips_in_a_row=1, then="rollback", skip_batch=True
    )
    spoiling = PipelineHooks("spoiling")

    @spoiling.on_optimizer_step.after
    def spoil(args: PipelineHookArgs) -> None:
        if args.global_step_id == 3 and args.update_committed:
            next(args.model.parameters()).data.view(-1)[0] = NAN

    run = make_run(tmp_path, EACH, guard, spoiling)
    run()
    assert rolled_back(tmp_path) == [(6, 3)]
    assert (run.progress.optimizer_step_id, run.progress.skipped_optimizer_steps) == (5, 1)


def test_rollbacks_are_bounded(tmp_path: Path) -> None:
    """A fault that comes again ends the run after ``max_rollbacks``, with the count."""
    batches: list[Any] = [tuple(part.clone() for part in batch) for batch in make_loader()]
    batches[4][0][0, 0] = NAN
    guard = NonFiniteGuardConfig(then="rollback", max_rollbacks=2)
    with pytest.raises(NonFiniteError, match=r"rolled back 2 times before \(max_rollbacks=2\)"):
        make_run(tmp_path, EACH, guard, loader=batches)()
    assert rolled_back(tmp_path) == [(5, 4)] * 2
    state = read_run_state(tmp_path)
    assert state.error is not None
    assert (state.state, state.error.type) == ("failed", "NonFiniteError")


def test_rollback_without_a_checkpoint_fails(tmp_path: Path) -> None:
    """Without any checkpoint, and without a healthy one, the error states the request."""
    guard = NonFiniteGuardConfig(then="rollback")
    late = SaveCheckpointConfig(every="5 steps")
    glitch = SimpleBatchProcessor.from_callable(Glitch(2))
    with pytest.raises(CheckpointError, match=r"rollback at step 2 .*there is no checkpoint yet"):
        make_run(tmp_path / "none", late, guard, batch_processor=glitch)()
    with pytest.raises(CheckpointError, match=r"rollback at step 2 .*finite weights"):
        make_run(tmp_path / "poisoned", EACH, guard, Poison(1))()
    with pytest.raises(PipelineConfigError, match="register a SaveCheckpoint"):
        make_run(tmp_path, guard)()


def test_stop_with_a_rollback_keeps_the_healthy_checkpoint(tmp_path: Path) -> None:
    """A run that is interrupted right after a bad update ends as preempted, at the checkpoint."""
    stopping = PipelineHooks("stopping")

    @stopping.on_step.after(when="at steps 4")
    def stop(args: PipelineHookArgs) -> None:
        args.requests.save("a signal")
        args.requests.stop("a signal", exit_code=143)

    guard = NonFiniteGuardConfig(then="rollback", read="one update late")
    glitch = SimpleBatchProcessor.from_callable(Glitch(4))
    saver = SaveCheckpointConfig(every="2 steps")
    run = make_run(tmp_path, saver, guard, stopping, batch_processor=glitch)
    with pytest.raises(RunPreempted):
        run()
    assert (run.progress.global_step_id, rolled_back(tmp_path)) == (2, [(4, 2)])
    assert read_run_state(tmp_path).state == "preempted"
    assert saved_steps(tmp_path) == {2: ()}


def test_two_ranks_roll_back_together(tmp_path: Path) -> None:
    """A NaN of one rank rolls both ranks back; a verdict holds the findings of both ranks."""
    launch(SCRIPTS / "poisoned_on_ranks.py", tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        for kind in ("glitch", "late", "skip_batch"):
            assert rank[kind]["progress"] == rank["straight"]["progress"] | rank[kind]["skipped"]
        for kind in ("glitch", "late"):
            assert torch.equal(rank[kind]["weights"], rank["straight"]["weights"])
        assert torch.equal(rank["skip_batch"]["weights"], rank["without"]["weights"])
        assert rank["poisoned"]["saved"] == {2: [], 4: ["losses"], 6: ["model/0.weight"]}
        assert rank["poisoned"]["resumed_at"] == 4
        assert rank["sharded"] == ([], ["model/0.weight"])  # in the shard of the second rank
        assert rank["bound"].startswith("NonFiniteGuard: ")
        assert "rolled back 1 times before" in rank["bound"]
    assert rolled_back(tmp_path / "glitch") == [(6, 4)]
    assert rolled_back(tmp_path / "late") == [(6, 4)]
    assert rolled_back(tmp_path / "skip_batch") == [(6, 4)]


def test_save_without_a_hook_has_the_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``trainer.save_checkpoint`` records and reports non-finite weights as well."""
    run = make_run(tmp_path, Poison(2), max_step=2)
    run()
    run.save_checkpoint(tmp_path / "mine")
    assert load_checkpoint(tmp_path / "mine").info.non_finite == ("model/0.weight",)
    assert "mine has non-finite values in model/0.weight;" in caplog.text
