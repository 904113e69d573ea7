"""Order and effect of hooks' requests at commit points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError
from robo_orchard_lab.pipeline.metrics import MetricValue, UnknownMetricError
from tiny import equal, loss_of, make_loader, make_trainer, weights


class Watcher(PipelineHooks):
    """Records events, and evaluates by publishing a number."""

    def __init__(self, name: str = "watcher") -> None:
        super().__init__(name)
        self.events: list[str] = []
        self.on_loop.before(self._open)
        self.on_epoch.after(lambda args: self.events.append(f"epoch {args.epoch_id} ends"))
        self.on_step.after(lambda args: self.events.append(f"step {args.global_step_id + 1}"))
        self.on_evaluation.before(lambda args: self.events.append(f"begin {args.evaluation}"))
        self.on_evaluation.after(lambda args: self.events.append(f"end {args.evaluation}"))

    def _open(self, args: PipelineHookArgs) -> None:
        args.run.evaluations[self.name] = self._evaluate
        args.metrics.listen(lambda record: self.events.append(f"log {record.global_step_id}"))

    def _evaluate(self, args: PipelineHookArgs) -> None:
        assert not args.progress.in_step
        self.events.append(f"evaluate at {args.global_step_id}")
        args.metrics.publish(f"eval/{self.name}", args.global_step_id, reduce="last")


def requesting(when: str, *kinds: str, name: str | None = None) -> PipelineHooks:
    """Return a hook that makes these requests on a trigger."""
    hooks = PipelineHooks(f"asks for {kinds} {when}")

    def ask(args: PipelineHookArgs) -> None:
        for kind in kinds:
            if kind == "evaluate":
                args.requests.evaluate("it is time", name=name)
            elif kind == "log":
                args.requests.log("it is time")
            else:
                args.requests.stop("it is time")

    hooks.register_at_commit(ask, when)
    return hooks


def events_of(*hooks: PipelineHooks, **options: Any) -> list[str]:
    watcher = Watcher()
    make_trainer([watcher, *hooks], loader=make_loader(4), **options)()
    return watcher.events


def test_evaluations_run_before_the_log() -> None:
    """At a commit point evaluations run before logging, so the record contains their metrics."""
    events = events_of(requesting("2 steps", "log", "evaluate"), max_step=3)
    assert events == [
        *("step 1", "step 2"),
        *("begin watcher", "evaluate at 2", "end watcher", "log 2", "step 3", "epoch 0 ends"),
    ]


def test_requests_at_the_end_of_an_epoch_are_merged() -> None:
    """A request by steps and a request by epochs make one evaluation and one logging point."""
    events = events_of(
        requesting("4 steps", "log", "evaluate"),
        requesting("1 epoch", "evaluate", "log"),
        max_epoch=2,
    )
    commit = ["begin watcher", "evaluate at 4", "end watcher", "log 4"]
    assert events[:9] == ["step 1", "step 2", "step 3", "step 4", "epoch 0 ends", *commit]
    assert events.count("log 8") == events.count("evaluate at 8") == 1
    assert events[-1] == "log 8"


def test_requests_made_with_a_stop_are_carried_out() -> None:
    """Requests made together with a stop are carried out, after the epoch scope exits."""
    events = events_of(requesting("2 steps", "stop", "evaluate", "log"), max_epoch=2)
    assert events[1:] == [
        *("step 2", "epoch 0 ends"),
        *("begin watcher", "evaluate at 2", "end watcher", "log 2"),
    ]


def test_an_evaluation_can_be_requested_by_name() -> None:
    """Only the named hook evaluates; without a name all hooks evaluate, in order."""
    one, two = Watcher("one"), Watcher("two")
    make_trainer(
        [
            one,
            two,
            requesting("at steps 1", "evaluate", name="two"),
            requesting("at steps 2", "evaluate"),
        ],
        max_step=3,
    )()
    begun = [event for event in one.events if event.startswith("begin")]
    assert begun == ["begin two", "begin one", "begin two"]


def test_a_metric_subscriber_can_make_requests() -> None:
    """A subscriber's request is carried out at the same commit point."""
    watcher = Watcher()
    hooks = PipelineHooks("requests when notified")

    @hooks.on_loop.before
    def subscribe(args: PipelineHookArgs) -> None:
        def ask(value: object) -> None:
            args.requests.evaluate("notified")
            args.requests.log("notified")

        args.metrics.subscribe("seen", ask)

    @hooks.on_step.after(when="at steps 2")
    def publish(args: PipelineHookArgs) -> None:
        args.metrics.publish("seen", 1.0)
        args.requests.log("it is time")

    make_trainer([watcher, hooks], max_step=4)()
    assert watcher.events[2:6] == ["log 2", "begin watcher", "evaluate at 2", "end watcher"]
    assert watcher.events.count("log 2") == 1


def test_an_evaluation_without_an_evaluator_is_refused() -> None:
    """The error names the requesting hook and the hooks able to evaluate."""
    with pytest.raises(PipelineStateError, match=r"ask \(test_commit_point.*register a Validation"):
        make_trainer([requesting("1 steps", "evaluate")], max_step=2)()
    with pytest.raises(PipelineStateError, match=r"by 'wacher'.*did you mean 'watcher'"):
        events_of(requesting("1 steps", "evaluate", name="wacher"), max_step=2)


def test_subscribing_to_a_missing_metric_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing metric is warned about at first, and raised at a later commit point."""
    hooks = PipelineHooks("waits")
    hooks.on_loop.before(lambda args: args.metrics.subscribe("los", print, who="waits"))
    hooks.on_step.after(lambda args: args.metrics.publish("loss", args.loss))
    trainer = make_trainer(
        [hooks, requesting("3 steps", "log")], loader=make_loader(2), max_epoch=3
    )
    with pytest.raises(UnknownMetricError, match=r"'los'.*waits waits for; did you mean 'loss'"):
        trainer()
    assert trainer.progress.global_step_id == 6
    trainer.save_checkpoint(tmp_path / "whole")
    assert [r.getMessage() for r in caplog.records if "no metric 'los'" in r.getMessage()] == [
        "after a whole epoch, no metric 'los' was published, which waits waits for; "
        "did you mean 'loss'? Published: loss"
    ]


class Saver(PipelineHooks):
    """Requests the weights at every second step."""

    def __init__(self, path: Path, which: str | None = None) -> None:
        super().__init__()
        self._path, self._which = path, which
        self.register_at_commit(self._ask, "2 steps")

    def _ask(self, args: PipelineHookArgs) -> None:
        args.requests.save_weights(
            self._path, "to see", weights=self._which, metadata={"why": "to see"}
        )


def test_weights_are_saved_on_request(tmp_path: Path) -> None:
    """The file holds the weights of the commit point by name, with the counters."""
    kept: list[list[torch.Tensor]] = []
    hooks = PipelineHooks("keeps")
    hooks.on_step.before(lambda args: kept.append(weights(args.model)))
    make_trainer([Saver(tmp_path / "new" / "model.safetensors"), hooks], max_step=3)()
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert sorted(saved) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    first, second = saved["0.weight"], saved["0.bias"]
    assert equal([first, second], kept[2][:2])  # initial weights of the third step
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert file.metadata() == {
            "epoch_id": "0",
            "global_step_id": "2",
            "optimizer_step_id": "2",
            "why": "to see",
        }
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    """The run fails and the old file stays intact if the folder can't hold the file."""
    path = tmp_path / "model.safetensors"
    path.mkdir()  # can't be replaced by a file
    (path / "old").touch()
    with pytest.raises(OSError, match="model"):
        make_trainer([Saver(path)], max_step=3)()
    assert [file.name for file in tmp_path.rglob("*")] == ["model.safetensors", "old"]


def test_weights_that_no_hook_keeps_are_refused(tmp_path: Path) -> None:
    """The error lists the hooks able to provide weights."""
    with pytest.raises(PipelineConfigError, match=r"no hook named 'ema' keeps weights; hooks that"):
        make_trainer([Saver(tmp_path / "x.safetensors", "ema")], max_step=3)()


@pytest.fixture
def skipping() -> PipelineHooks:
    hooks = PipelineHooks("skips")

    @hooks.on_optimizer_step.before(when="at steps 3, 4")
    def skip(args: PipelineHookArgs) -> None:
        args.skip_reason = "it looks wrong"

    return hooks


def test_a_skipped_update_changes_nothing(skipping: PipelineHooks) -> None:
    """A skipped update changes neither weights, optimizer nor LR scheduler, and is counted."""
    committed: list[bool | None] = []
    skipping.on_optimizer_step.after(lambda args: committed.append(args.update_committed))
    gradients: list[Any] = []
    skipping.on_step.before(
        lambda args: gradients.append(next(args.model.parameters()).grad),
    )
    trainer = make_trainer([skipping], max_step=6)
    reference = make_trainer(loader=_without(make_loader(), 2, 3), max_step=4)
    trainer()
    reference()
    assert equal(weights(trainer.model), weights(reference.model))
    assert committed == [True, True, False, False, True, True]
    assert gradients == [None] * 6
    assert trainer.progress.optimizer_step_id == 4
    assert trainer.progress.skipped_optimizer_steps == 2


@pytest.mark.parametrize("end", ["a limit", "a hook"])
def test_a_run_that_ends_between_logging_points_logs_a_partial_record(end: str) -> None:
    """Values published since the last logging point are logged in a partial record."""
    logged: list[tuple[int, bool, dict[str, float]]] = []
    hooks = PipelineHooks("publishes")

    @hooks.on_loop.before
    def listen(args: PipelineHookArgs) -> None:
        args.metrics.listen(
            lambda record: logged.append(
                (record.global_step_id, record.partial, {v.name: v.value for v in record.values})
            )
        )

    @hooks.on_step.after
    def publish(args: PipelineHookArgs) -> None:
        args.metrics.publish("step", args.global_step_id + 1)

    def train(steps: int) -> None:
        stop = [requesting(f"at steps {steps}", "stop")] if end == "a hook" else []
        max_step = 9 if stop else steps
        make_trainer(
            [hooks, requesting("4 steps", "log"), *stop], loader=make_loader(4), max_step=max_step
        )()

    train(6)
    assert logged == [(4, False, {"step": 2.5}), (6, True, {"step": 5.5})]
    logged.clear()
    train(4)
    assert logged == [(4, False, {"step": 2.5})]


def _without(loader: Any, *positions: int) -> list[Any]:
    return [batch for position, batch in enumerate(loader) if position not in positions]


def test_a_request_after_the_last_commit_point_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A request after the last commit point has no effect, and the log names the hook."""
    hooks = PipelineHooks("late")
    path = tmp_path / "late.safetensors"
    hooks.on_loop.after(lambda args: args.requests.save_weights(path, "too late", by="late"))
    make_trainer([hooks], max_step=2)()
    assert "late made a request after the last commit point" in caplog.text
    assert not path.exists()


def test_a_stop_before_the_first_evaluation_is_no_error() -> None:
    """A run stopped by request need not publish the metrics its hooks subscribe to."""
    hooks = PipelineHooks("waits")
    hooks.on_loop.before(lambda args: args.metrics.subscribe("eval/val/loss", print, who="waits"))
    trainer = make_trainer([hooks, requesting("2 steps", "stop")], max_step=5)
    trainer()
    assert trainer.progress.global_step_id == 2


def test_max_optimizer_step_without_a_backward_pass_is_refused() -> None:
    """max_optimizer_step is refused if the batch processor needs no backward pass."""
    processor = SimpleBatchProcessor.from_callable(loss_of, need_backward=False)
    with pytest.raises(PipelineConfigError, match="max_optimizer_step counts optimizer steps"):
        make_trainer(batch_processor=processor, max_optimizer_step=1)


def test_a_stop_at_a_logging_point_leaves_no_partial_record() -> None:
    """The record being logged is the last one if a subscriber stops the run."""
    watcher = Watcher()
    hooks = PipelineHooks("stops")
    publish = hooks.on_step.after(when="2 steps")
    publish(lambda args: args.metrics.publish("loss", args.loss))

    @hooks.on_loop.before
    def subscribe(args: PipelineHookArgs) -> None:
        args.metrics.before_logging(lambda: args.metrics.publish("gathered", 1.0))
        args.metrics.subscribe("loss", lambda value: args.requests.stop("enough"))

    make_trainer(
        [watcher, hooks, requesting("2 steps", "log")], loader=make_loader(4), max_step=9
    )()
    assert watcher.events == ["step 1", "step 2", "log 2", "epoch 0 ends"]


def test_a_run_too_short_for_an_evaluation_is_no_error() -> None:
    """A subscriber to an evaluation metric causes no error if no evaluation was due."""
    hooks = PipelineHooks("waits")
    hooks.on_loop.before(lambda args: args.metrics.subscribe("eval/val/loss", print, who="waits"))
    trainer = make_trainer([Watcher(), hooks], max_step=2)
    trainer()
    assert trainer.progress.global_step_id == 2


def test_a_subscribed_metric_needs_no_logging_point() -> None:
    """The subscriber is called at the commit point of each step that published the metric."""
    found: list[MetricValue] = []
    hooks = PipelineHooks("waits")
    hooks.on_loop.before(lambda args: args.metrics.subscribe("loss", found.append, who="waits"))
    publish = hooks.on_step.after(when="2 steps")
    publish(lambda args: args.metrics.publish("loss", args.global_step_id))
    make_trainer([hooks], loader=make_loader(3), max_epoch=2)()
    assert [(value.step, value.value) for value in found] == [(2, 1), (4, 3), (6, 5)]


def test_files_of_hooks_are_written_before_the_checkpoint() -> None:
    """A hook's own files are written after evaluations and the log, before a checkpoint."""
    watcher = Watcher()
    hooks = requesting("at steps 2", "evaluate", "log")

    @hooks.on_step.after(when="at steps 2")
    def ask(args: PipelineHookArgs) -> None:
        args.run.savers["saver"] = lambda reason: watcher.events.append("save")
        args.requests.save("to see")
        args.requests.write(lambda: watcher.events.append("write"), "to see")

    make_trainer([watcher, hooks], max_step=3)()
    assert watcher.events[2:-3] == [
        *("begin watcher", "evaluate at 2", "end watcher", "log 2", "write", "save")
    ]
    assert watcher.events[-3:] == ["step 3", "epoch 0 ends", "save"]  # events of the end
