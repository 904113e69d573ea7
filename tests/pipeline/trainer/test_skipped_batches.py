"""Batches that hooks skip: no forward, no backward, and the mean of the window's other samples."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.errors import PipelineStateError
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    LossTrackerConfig,
    MetricsLoggerConfig,
    NonFiniteGuardConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, read_metrics
from robo_orchard_lab.pipeline.trainer.skipped_batches import METRIC
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights


class Skipper(PipelineHooks):
    """Hook that skips some steps, and records what runs."""

    def __init__(self, steps: Collection[int], channel: str = "on_batch") -> None:
        super().__init__()
        self.steps, self.forwards, self.updates = steps, list[int](), list[int]()
        self.sizes = list[int]()
        getattr(self, channel).before(self.skip)
        self.on_model_forward.before(lambda args: self.forwards.append(args.global_step_id))
        self.on_optimizer_step.after(lambda args: self.updates.append(args.global_step_id))
        self.on_step.after(lambda args: self.sizes.append(args.batch_size))

    def skip(self, args: PipelineHookArgs) -> None:
        if args.global_step_id in self.steps:
            args.skip_batch("corrupt sample")


def plain(
    skips: Collection[int], accumulate: int, rest: int, given: list[float] | None = None
) -> tuple[list[torch.Tensor], int]:
    """Return weights and number of updates of a plain loop over the other batches."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updates, batches = 0, list(enumerate(make_loader(6, rest=rest)))
    for begin in range(0, len(batches), accumulate):
        window = [b for b in batches[begin : begin + accumulate] if b[0] not in skips]
        if not window:
            continue
        sizes = [len(batch[0]) if given is None else given[step] for step, batch in window]
        optimizer.zero_grad()
        for (_, batch), size in zip(window, sizes, strict=True):
            (loss_of(model, batch)[1] * size / sum(sizes)).backward()
        optimizer.step()
        updates += 1
    return weights(model), updates


@pytest.mark.parametrize("channel", ["on_step", "on_batch"])
@pytest.mark.parametrize(
    ("skips", "accumulate", "rest"),
    [
        ({0, 3}, 1, 0),
        ({1}, 3, 0),
        ({2}, 3, 1),  # the end of a window
        ({0, 1, 2}, 3, 2),  # an entire window
        ({0, 2, 4, 6}, 2, 1),
        ({6}, 7, 1),  # the short batch
        (set(range(7)), 2, 3),
    ],
    ids=str,
)
def test_update_is_the_mean_over_the_other_samples(
    skips: set[int], accumulate: int, rest: int, channel: str
) -> None:
    """Skipped batches run no forward, count as steps, and leave the mean of the others."""
    model, hook = make_model(), Skipper(skips, channel)
    steps = 6 + (rest > 0)
    trainer = make_trainer(
        [hook, GradientClippingHookConfig(max_norm=1e9), StatsMonitorConfig()],
        model=model,
        loader=make_loader(6, rest=rest),
        accumulate=accumulate,
        max_epoch=1,
    )
    trainer()
    expected, updates = plain(skips, accumulate, rest)
    for ours, theirs in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert hook.forwards == [step for step in range(steps) if step not in skips]
    assert trainer.progress.global_step_id == steps
    assert trainer.progress.optimizer_step_id == updates == len(hook.updates)
    assert trainer.progress.skipped_batches == len(skips)
    assert all((size == 0) == (step in skips) for step, size in enumerate(hook.sizes))


def test_weighted_losses_keep_their_weights() -> None:
    """Losses with weights of the processor use the weights of the other batches."""
    given, left = [1.0, 5.0, 2.0, 4.0, 3.0, 6.0], iter(range(6))
    skips = {1, 3, 4}
    keep = iter([given[step] for step in left if step not in skips])
    model = make_model()
    make_trainer(
        [Skipper(skips)],
        model=model,
        loader=make_loader(6),
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda m, b: (*loss_of(m, b), next(keep))
        ),
        accumulate=2,
        max_epoch=1,
    )()
    expected, _ = plain(skips, 2, 0, given)
    for ours, theirs in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stop", range(1, 7))
def test_resume_within_a_window_is_exact(stop: int, tmp_path: Path) -> None:
    """A run stopped at any step of windows with skipped batches resumes bit for bit."""

    def run(max_step: int, resume: Path | None = None) -> tuple[Any, HookBasedTrainer]:
        model = make_model()
        trainer = make_trainer(
            [Skipper({0, 2, 3, 4, 5, 6})],
            model=model,
            loader=make_loader(8),
            accumulate=4,
            max_step=max_step,
            resume_from=resume,
        )
        return model, trainer

    model, uninterrupted = run(8)
    uninterrupted()
    _, first = run(8)
    first.hooks.on_step.after(
        lambda args: args.global_step_id + 1 == stop and args.requests.stop("stopped")
    )
    first()
    first.save_checkpoint(tmp_path / "saved")
    resumed_model, resumed = run(8, tmp_path / "saved")
    assert resumed.progress.skipped_batches == len({0, 2, 3, 4, 5, 6} & set(range(stop)))
    resumed()
    assert equal(weights(resumed_model), weights(model))
    assert resumed.progress.skipped_batches == 6
    assert resumed.progress == uninterrupted.progress


def test_skips_are_reported_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has one warning per reason; the metrics file has the number of skipped batches."""
    file = tmp_path / "metrics.jsonl"
    hooks: list[Any] = [
        Skipper({0, 1, 2, 5}),
        LossTrackerConfig(),
        NonFiniteGuardConfig(),
        MetricsLoggerConfig(every="3 steps", sinks=[JsonLinesSinkConfig(path=str(file))]),
    ]
    with caplog.at_level(logging.INFO):
        make_trainer(hooks, loader=make_loader(6), max_epoch=1, run_folder=tmp_path)()
    warned = [r.getMessage() for r in caplog.records if "skipped the batch" in r.getMessage()]
    assert len(warned) == 1
    assert "step 0 on rank 0, number 1 of this rank: corrupt sample" in warned[0]
    records = [{value.name: value.value for value in r.values} for r in read_metrics(file)]
    assert [record[METRIC] for record in records] == [3.0, 1.0]


def test_no_update_without_samples_is_not_due() -> None:
    """Triggers by updates aren't due at a window without samples, nor does its update open."""
    due = list[int]()
    hook = Skipper({2, 3})
    hook.register_hook(
        "on_step",
        HookContext.from_callable(after=lambda args: due.append(args.global_step_id)),
        "1 optimizer step",
    )
    make_trainer([hook], loader=make_loader(6), accumulate=2, max_epoch=1)()
    assert hook.updates == due == [1, 5]


@pytest.mark.parametrize("channel", ["on_model_forward", "on_model_backward", "on_optimizer_step"])
def test_late_skip_is_an_error(channel: str) -> None:
    """A skip after the forward pass has begun is an error that names the right places."""
    with pytest.raises(PipelineStateError, match=r"args\.skip_batch.* before of"):
        make_trainer([Skipper({1}, channel)], max_epoch=1)()


def test_skip_outside_a_step_and_without_a_reason_are_errors() -> None:
    """Only steps have batches, and a reason is a text."""
    with pytest.raises(PipelineStateError, match="expected a call before the forward pass"):
        PipelineHookArgs().skip_batch("x")
    hooks = PipelineHooks("bad")
    hooks.on_step.before(lambda args: args.skip_batch(""))
    with pytest.raises(ValueError, match="expected a reason, such as 'corrupt sample', found ''"):
        make_trainer([hooks], max_epoch=1)()


def test_skipped_batches_are_saved_with_checkpoints(tmp_path: Path) -> None:
    """A run with a SaveCheckpoint continues the count of skipped batches."""

    def hooks() -> list[Any]:
        return [Skipper({1, 2, 5}), SaveCheckpointConfig(every="2 steps")]

    make_trainer(hooks(), max_step=4, run_folder=tmp_path)()
    trainer = make_trainer(hooks(), max_step=7, run_folder=tmp_path, resume_from="auto")
    assert trainer.progress.skipped_batches == 2
    trainer()
    assert trainer.progress.skipped_batches == 3


def test_ranks_train_on_the_other_samples(tmp_path: Path) -> None:
    """Both ranks continue with the mean over the other samples if one of them skips."""
    launch(SCRIPTS / "skip_on_ranks.py", tmp_path, processes=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, run in results[0].items():
        assert equal(run["weights"], results[1][name]["weights"]), name
        for ours, theirs in zip(run["weights"], run["expected"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
        assert run["updates"] == results[1][name]["updates"] == run["expected_updates"], name
        assert run["logged"] == run["skipped"] + results[1][name]["skipped"]
        assert equal(run["resumed"], run["weights"]), name
    assert results[0]["alone"]["skipped"] != results[1]["alone"]["skipped"]


def test_ranks_that_did_not_allow_skips_get_an_error(tmp_path: Path) -> None:
    """Without allow_skip_batch on every rank, the job fails with a message, and doesn't hang."""
    for mode, message in (
        ("nobody", "call args.allow_skip_batch()"),
        ("one", "loss weights"),
    ):
        run = launch(
            SCRIPTS / "skip_on_ranks.py", tmp_path, mode, processes=2, fails=True, timeout_s=60
        )
        assert message in run.stderr, mode


def named_trainer(hook: Skipper, accumulate: int = 1) -> HookBasedTrainer:
    model = make_model()
    layers = {"a": model[0], "b": model[2]}  # type: ignore[index]  # a Sequential
    sgd = {name: torch.optim.SGD(layer.parameters(), lr=0.1) for name, layer in layers.items()}

    def forward(module: Any, batch: Any) -> Any:
        outputs, loss = loss_of(module, batch)
        return outputs, {"a": loss, "b": loss}

    return HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        model,
        make_loader(6),
        SimpleBatchProcessor.from_callable(forward),
        sgd,
        hooks=[hook],
        max_epoch=1,
    )


def test_named_optimizers_make_no_update_for_a_skipped_batch() -> None:
    """A skipped batch makes no update of several optimizers; accumulation is refused."""
    hook = Skipper({1, 4})
    trainer = named_trainer(hook)
    trainer()
    expected, updates = plain({1, 4}, 1, 0)
    for ours, theirs in zip(weights(trainer.model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert trainer.progress.optimizer_steps == {"a": updates, "b": updates}
    with pytest.raises(PipelineStateError, match="several optimizers, expected one process"):
        named_trainer(Skipper({1}), accumulate=2)()
    with pytest.raises(PipelineStateError, match="expected a call before the forward pass"):
        named_trainer(Skipper({1}, "on_model_forward"))()
