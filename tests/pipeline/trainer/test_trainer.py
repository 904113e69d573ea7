"""Arguments, refusals, limits and scopes of the trainer."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from robo_orchard_core.utils.hook import HookRegistrationError
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
    TrainerProgress,
)
from robo_orchard_lab.pipeline.errors import BatchProcessorError, DataError, PipelineConfigError
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    StatsMonitorConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.progress import ChannelName
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights


def on(channel: ChannelName, before: Any = None, after: Any = None) -> PipelineHooks:
    hooks = PipelineHooks()
    hooks.register_hook(channel, HookContext.from_callable(before, after))
    return hooks


class Counting(IterableDataset[torch.Tensor]):
    """Seven samples, without a length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(28.0).reshape(7, 4))


class Batches:
    """An iterable of batches without a length, other than a DataLoader."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(28.0).reshape(7, 1, 4))


def outputs_only(model: torch.nn.Module, batch: Any) -> tuple[Any, torch.Tensor]:
    inputs = batch["x"] if isinstance(batch, dict) else batch
    outputs = model(inputs.float())
    return {"outputs": outputs}, outputs.square().mean()


SOURCES: dict[str, Any] = {
    "iterable dataset": lambda: DataLoader(Counting(), batch_size=1),
    "any iterable": Batches,
    "list": lambda: list(Batches()),
    "dicts": lambda: [{"name": "a", "x": batch} for batch in Batches()],
    "batched by the sampler": lambda: DataLoader(
        torch.arange(28.0).reshape(7, 4),  # type: ignore[arg-type]  # indexable is enough
        batch_size=None,
        sampler=BatchSampler(SequentialSampler(range(7)), 1, drop_last=False),
    ),
    "custom batch sampler": lambda: DataLoader(
        torch.arange(28.0).reshape(7, 4),  # type: ignore[arg-type]  # indexable is enough
        batch_sampler=[[index] for index in range(7)],
    ),
    "drop last": lambda: DataLoader(
        torch.arange(28.0).reshape(7, 4).repeat(1, 1),  # type: ignore[arg-type]  # see above
        batch_size=1,
        drop_last=True,
    ),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_any_source_of_batches(source: str, accumulate: int) -> None:
    """Every kind of loader gives the same seven batches, and the same weights."""
    trained = []
    for make in (SOURCES[source], SOURCES["list"]):
        model = make_model()
        trainer = make_trainer(
            model=model,
            loader=make(),
            accumulate=accumulate,
            batch_processor=SimpleBatchProcessor.from_callable(outputs_only),
            max_epoch=2,
        )
        trainer()
        assert trainer.progress.global_step_id == 14
        assert trainer.progress.epoch_id == 2
        trained.append(weights(model))
    assert equal(*trained)


def test_drop_last_is_known_to_the_windows() -> None:
    """The last window of a loader with drop_last has full batches and ends with an update."""
    trainer = make_trainer(loader=make_loader(7, rest=2, drop_last=True), accumulate=3, max_epoch=1)
    trainer()
    assert trainer.progress == TrainerProgress(1, 0, 7, 3, 0)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({"max_epoch": 2}, TrainerProgress(2, 0, 14, 6)),
        ({"max_step": 10}, TrainerProgress(1, 3, 10, 4)),
        ({"max_step": 7}, TrainerProgress(1, 0, 7, 3)),
        ({"max_optimizer_step": 4}, TrainerProgress(1, 3, 10, 4)),
        ({"max_optimizer_step": 3}, TrainerProgress(1, 0, 7, 3)),
        ({"max_step": 10, "max_epoch": 1}, TrainerProgress(1, 0, 7, 3)),
    ],
)
def test_limits_count_what_they_name(limit: dict[str, Any], expected: TrainerProgress) -> None:
    """Seven batches in windows of three: each limit ends the run by its own counter."""
    trainer = make_trainer(accumulate=3, **limit)
    trainer()
    assert trainer.progress == expected


def test_no_batch_is_loaded_beyond_the_limit() -> None:
    """A run of three steps loads three batches, also with accumulation."""
    for accumulate in (1, 2):
        taken: list[int] = []

        def batches(taken: list[int] = taken) -> Iterator[Any]:
            for index, batch in enumerate(make_loader()):
                taken.append(index)
                yield batch

        make_trainer(loader=batches(), accumulate=accumulate, max_step=3)()
        assert taken == [0, 1, 2]


@pytest.mark.parametrize("channel", ["on_loop", "on_epoch"])
def test_a_stop_before_the_first_step_is_granted(channel: ChannelName) -> None:
    """A stop requested before the first batch leaves the counters at zero."""
    trainer = make_trainer(on(channel, lambda args: args.requests.stop("not today")), max_epoch=2)
    trainer()
    assert trainer.progress == TrainerProgress()


def test_hooks_are_added_not_replaced() -> None:
    """Assigning other hooks is refused with the remedy; += adds hooks."""
    trainer = make_trainer(max_step=1)
    with pytest.raises(PipelineConfigError, match=r"trainer\.hooks \+= hook"):
        trainer.hooks = PipelineHooks()
    ran: list[int] = []
    trainer.hooks += on("on_step", lambda args: ran.append(1))
    trainer()
    assert ran == [1]


@pytest.mark.parametrize("processor", [loss_of, SimpleBatchProcessor, 3])
def test_an_invalid_processor_is_refused(processor: Any) -> None:
    """A function, a class or another object is refused with the remedy."""
    with pytest.raises(PipelineConfigError, match=r"wrap a function with .*from_callable"):
        make_trainer(batch_processor=processor, max_step=1)


def test_only_a_callable_makes_a_processor() -> None:
    """from_callable refuses an object that can't be called."""
    with pytest.raises(TypeError, match=r"forward\(model, batch\), got int"):
        SimpleBatchProcessor.from_callable(3)  # type: ignore[arg-type]  # what is tested


def test_an_optimizer_of_another_model_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """An optimizer without parameters of the model is warned about."""
    make_trainer(optimizer=torch.optim.SGD(make_model(5).parameters(), lr=0.1), max_step=1)
    assert "holds none of the model's 4 trainable parameters" in caplog.text


def test_a_caught_error_keeps_neither_workers_nor_outputs() -> None:
    """After a caught error, outputs and workers are freed without the garbage collector."""
    outputs: list[weakref.ref[torch.Tensor]] = []

    def fail(args: PipelineHookArgs) -> None:
        outputs.append(weakref.ref(args.model_outputs))
        raise KeyError("on purpose")

    trainer = make_trainer(
        on("on_model_backward", fail), loader=make_loader(num_workers=1), max_step=3
    )
    gc.collect()
    gc.disable()
    try:
        with suppress(KeyError):
            trainer()
        assert outputs[0]() is None
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_a_finished_run_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Called again after its end, the trainer opens no scope and changes no counter."""
    opened: list[int] = []
    trainer = make_trainer(on("on_loop", lambda args: opened.append(1)), max_epoch=1)
    trainer()
    before = weights(trainer.model)
    with caplog.at_level(logging.INFO):
        trainer()
    assert opened == [1]
    assert equal(weights(trainer.model), before)
    assert "nothing left to do" in caplog.text


def test_a_request_to_stop_is_granted_at_the_commit_point(caplog: pytest.LogCaptureFixture) -> None:
    """The current step is finished, and the log says which hook stopped the run, and why."""

    def ask(args: PipelineHookArgs) -> None:
        if args.global_step_id == 4:
            args.requests.stop("seen enough")

    trainer = make_trainer(on("on_model_forward", ask), max_epoch=9)
    with caplog.at_level(logging.INFO):
        trainer()
    assert trainer.progress == TrainerProgress(0, 5, 5, 5)
    assert "seen enough, requested by " in caplog.text
    assert "ask (test_trainer.py:" in caplog.text


def test_a_request_after_the_epoch_is_granted_there() -> None:
    """A stop requested at the end of an epoch ends the run after the epoch has been counted."""
    trainer = make_trainer(
        on("on_epoch", after=lambda args: args.requests.stop("one is enough")), max_epoch=9
    )
    trainer()
    assert trainer.progress == TrainerProgress(1, 0, 7, 7)


def test_an_epoch_reports_its_completion() -> None:
    """epoch_completed is True after the last batch, and False after a limit within an epoch."""
    seen: list[bool] = []
    hooks = on("on_epoch", after=lambda args: seen.append(args.epoch_completed))
    make_trainer(hooks, max_step=16)()
    assert seen == [True, True, False]


def test_a_loader_without_length_leaves_its_last_epoch_open() -> None:
    """Without a length, a run that ends with the last batch can't detect the end of the epoch."""
    trainer = make_trainer(
        loader=Batches(),
        batch_processor=SimpleBatchProcessor.from_callable(outputs_only),
        max_step=7,
    )
    trainer()
    assert trainer.progress == TrainerProgress(0, 7, 7, 7)


@pytest.mark.parametrize("loader", [[], iter([])])
def test_no_batch_is_an_error(loader: Any) -> None:
    """An epoch without a batch is refused, since the run would never end."""
    with pytest.raises(DataError, match="gave no batch in epoch 1"):
        make_trainer(loader=loader, max_step=3)()


def test_data_smaller_than_a_step_is_refused() -> None:
    """The error names drop_last if drop_last removes the only batch of an epoch."""
    data = TensorDataset(torch.zeros(3, 4), torch.zeros(3, 2))
    with pytest.raises(DataError, match=r"its 3 samples are less than one step .* drop_last=False"):
        make_trainer(loader=DataLoader(data, batch_size=4, drop_last=True), max_step=3)()


def test_an_iterator_lasts_one_epoch() -> None:
    """An exhausted iterator is an error in the second epoch, with the remedy."""
    with pytest.raises(DataError, match="epoch 2; an iterator can be read only once"):
        make_trainer(loader=iter(list(make_loader())), max_epoch=2)()


def test_set_epoch_is_called() -> None:
    """set_epoch is called in each epoch on the loader, or else on its sampler."""
    calls: list[tuple[str, int]] = []

    class Sampler(SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            calls.append(("sampler", epoch))

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return iter(make_loader(1))

        def set_epoch(self, epoch: int) -> None:
            calls.append(("loader", epoch))

    dataset = make_loader().dataset
    make_trainer(
        loader=DataLoader(dataset, batch_size=28, sampler=Sampler(dataset)),  # type: ignore[arg-type]  # it has a length
        max_epoch=2,
    )()
    make_trainer(loader=Loader(), max_epoch=1)()
    assert calls == [("sampler", 0), ("sampler", 1), ("loader", 0)]


def test_forward_only() -> None:
    """Without a backward pass there are no gradients, no updates and no channels for either."""
    opened: list[str] = []
    hooks = PipelineHooks()

    def note(channel: str, args: PipelineHookArgs) -> None:
        opened.append(channel)

    channels: list[ChannelName] = ["on_model_forward", "on_model_backward", "on_optimizer_step"]
    for channel in channels:
        hooks.register_hook(
            channel,
            HookContext.from_callable(before=partial(note, channel)),
        )
    grads: list[bool] = []
    model = make_model()
    before = weights(model)

    def forward(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, None]:
        outputs = model(batch[0])
        grads.append(outputs.requires_grad)
        return outputs, None

    trainer = HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        make_loader(2),
        SimpleBatchProcessor.from_callable(forward, need_backward=False),
        hooks=hooks,
        max_epoch=1,
    )
    trainer()
    assert opened == ["on_model_forward"] * 2
    assert grads == [False, False]
    assert equal(weights(model), before)
    assert trainer.progress == TrainerProgress(1, 0, 2, 0)
    assert trainer.optimizer is None


def test_backward_needs_an_optimizer() -> None:
    """A processor with a backward pass and no optimizer is refused when the trainer is built."""
    with pytest.raises(PipelineConfigError, match="needs an optimizer"):
        HookBasedTrainer(
            Accelerator(cpu=True),
            make_model(),
            make_loader(),
            SimpleBatchProcessor.from_callable(loss_of),
            max_step=1,
        )


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (torch.ones(()), "got Tensor"),
        (3, "got int"),
        ((1, 2, 3), "got a loss of type int with a weight"),
        ((1, 2, 3, 4), "got tuple"),
        (torch.ones(2, 3), "got Tensor"),
        ((torch.ones(2), None), "got a loss of type NoneType"),
    ],
)
def test_a_wrong_result_of_the_processor_is_refused(result: Any, found: str) -> None:
    """A result other than (outputs, loss) is refused with the type found."""
    processor = SimpleBatchProcessor.from_callable(lambda model, batch: result)
    with pytest.raises(BatchProcessorError, match=rf"must return \(outputs, loss\).*{found}"):
        make_trainer(batch_processor=processor, max_step=1)()


def test_hooks_see_gradients_then_weights() -> None:
    """The after of on_step sees the gradients; the after of on_optimizer_step, the new weights."""
    model = make_model()
    start = weights(model)
    seen: list[tuple[str, bool, bool]] = []

    def look(where: str) -> Any:
        def hook(args: PipelineHookArgs) -> None:
            has_gradients = all(p.grad is not None for p in model.parameters())
            seen.append((where, has_gradients, equal(weights(model), start)))

        return hook

    make_trainer(
        [on("on_step", after=look("step")), on("on_optimizer_step", look("in"), look("out"))],
        model=model,
        max_step=1,
    )()
    assert seen == [("step", True, True), ("in", True, True), ("out", False, False)]


def test_hooks_share_one_object_in_a_step() -> None:
    """All channels of a step get one argument object; the next step and the epoch get others."""
    objects: dict[str, list[Any]] = {}

    def keep(name: str, args: PipelineHookArgs) -> None:
        objects.setdefault(name, []).append(args)

    hooks = PipelineHooks()
    names: list[ChannelName] = ["on_loop", "on_epoch", "on_step", "on_batch", "on_model_forward"]
    names += ["on_model_backward", "on_optimizer_step"]
    for name in names:
        hooks.register_hook(
            name,
            HookContext.from_callable(
                before=partial(keep, name),
                after=partial(keep, name),
            ),
        )
    make_trainer(hooks, max_step=2)()
    first = objects["on_step"][0]
    for name in names[2:]:
        assert objects[name][:2] == [first, first]
        assert objects[name][2] is objects[name][3] is not first
    assert len({id(objects[name][0]) for name in ("on_loop", "on_epoch", "on_step")}) == 3
    assert first.model_outputs.shape == (4, 2)
    assert first.loss.shape == ()
    assert first.update_committed is True


def test_modes_of_submodules_are_kept() -> None:
    """A model in evaluation mode is set to training mode; submodule modes are kept."""
    model = make_model()
    model.eval()
    make_trainer(model=model, max_step=1)()
    assert all(module.training for module in model.modules())
    model[0].eval()  # type: ignore[index]  # a Sequential
    make_trainer(model=model, max_step=1)()
    assert not model[0].training  # type: ignore[index]  # a Sequential
    assert model.training


def test_hooks_with_equal_names_are_refused() -> None:
    """Two hooks with equal names are refused by the constructor and when the run starts."""
    with pytest.raises(HookRegistrationError, match="two hooks have one name: 'a'"):
        make_trainer([PipelineHooks("a"), PipelineHooks("a")], max_step=1)
    late = PipelineHooks("b")
    trainer = make_trainer([PipelineHooks("a"), late], max_step=1)
    late.name = "a"
    with pytest.raises(HookRegistrationError, match="two hooks have one name: 'a'"):
        trainer()


def test_an_accelerator_without_the_launchers_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under a launcher of two processes, an accelerator of one is refused with the remedy."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineConfigError, match=r"started 2 processes.*Accelerator\(cpu=True\)"):
        HookBasedTrainer(
            accelerator,
            make_model(),
            make_loader(),
            SimpleBatchProcessor.from_callable(loss_of, need_backward=False),
            max_step=1,
        )


def test_prepared_objects_are_accepted() -> None:
    """Objects prepared by the user train as objects prepared by the trainer."""
    model = make_model()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    prepared = accelerator.prepare(model, optimizer, make_loader(), scheduler)
    trainer = HookBasedTrainer(
        accelerator,
        prepared[0],
        prepared[2],
        SimpleBatchProcessor.from_callable(loss_of),
        prepared[1],
        prepared[3],
        max_epoch=2,
    )
    trainer()
    assert trainer.optimizer is optimizer
    assert trainer.lr_scheduler is scheduler
    assert scheduler.last_epoch == 14
    reference = make_model()
    updates = torch.optim.SGD(reference.parameters(), lr=0.1)
    make_trainer(
        model=reference,
        optimizer=updates,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(updates, 2, gamma=0.5),
        max_epoch=2,
    )()
    assert equal(weights(model), weights(reference))


def test_accelerate_knows_whether_gradients_are_complete() -> None:
    """accelerator.sync_gradients is True exactly in steps with an update."""
    seen: list[tuple[bool, bool]] = []
    trainer = make_trainer(
        on(
            "on_batch",
            lambda args: seen.append(
                (args.accelerator.sync_gradients, args.at_accumulation_boundary)
            ),
        ),
        accumulate=3,
        max_epoch=1,
    )
    trainer()
    assert seen == [(boundary, boundary) for boundary in [False, False, True] * 2 + [True]]


def test_accelerates_data_loader_options_are_honored() -> None:
    """The order of a seedable sampler depends on its seed alone."""
    options = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5)

    def order(seed: int) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def look(model: torch.nn.Module, batch: Any) -> tuple[None, None]:
            seen.append(batch[0])
            return None, None

        trainer = HookBasedTrainer(
            Accelerator(cpu=True, dataloader_config=options),
            make_model(),
            make_loader(shuffle=True),
            SimpleBatchProcessor.from_callable(look, need_backward=False),
            max_epoch=1,
        )
        torch.manual_seed(seed)
        trainer()
        return seen

    assert equal(order(1), order(2))


def test_batch_norm_with_one_sample_names_the_remedy() -> None:
    """Torch's error gets a note with the remedy."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    trainer = make_trainer(model=model, loader=make_loader(2, rest=1), max_epoch=1)
    with pytest.raises(ValueError, match="more than 1 value per channel") as failed:
        trainer()
    assert "drop_last=True to the data loader" in failed.value.__notes__[-1]


class Silent(PipelineHooks):
    pass


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def step_lr() -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(sgd(make_model()), 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": torch.nn.Linear}, "model: expected a torch.nn.Module, found the class Linear"),
        ({"model": "resnet18"}, r"model: .* found 'resnet18' \(str\); pass MyModel\(\)"),
        ({"accelerator": Accelerator}, "accelerator: .* found the class Accelerator; pass"),
        ({"dataloader": DataLoader}, "dataloader: .* found the class DataLoader; pass DataLoader"),
        ({"dataloader": "data/train"}, r"dataloader: .* found 'data/train' \(str\)"),
        ({"dataloader": None}, "dataloader: .* found None"),
        ({"optimizer": [sgd(make_model())]}, r"optimizer: .* \(list\); pass one with parameter gr"),
        ({"optimizer": torch.optim.SGD}, "optimizer: .* found the class SGD"),
        ({"lr_scheduler": [Silent()]}, r"lr_scheduler: .* \(list\)"),
        ({"lr_scheduler": torch.optim.lr_scheduler.StepLR}, "lr_scheduler: .* the class StepLR"),
        ({"lr_scheduler": sgd(make_model())}, "lr_scheduler: .*SGD"),
        ({"lr_scheduler": step_lr()}, r"StepLR of another SGD; .* StepLR\(optimizer, \.\.\.\)"),
        ({"lr_scheduler_every": "epoch"}, "expected an LR scheduler, found none; pass lr_sched"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused(wrong: Any, message: str) -> None:
    """The error names the argument, what was expected and found, and the remedy."""
    model = make_model()
    right = {
        "accelerator": Accelerator(cpu=True),
        "model": model,
        "dataloader": make_loader(),
        "batch_processor": SimpleBatchProcessor.from_callable(loss_of),
        "optimizer": sgd(model),
    }
    with pytest.raises(PipelineConfigError, match=message):
        HookBasedTrainer(**{**right, **wrong}, hooks=[], max_step=1)


@pytest.mark.parametrize("hooks", [Silent, [Silent]])
def test_a_hook_class_instead_of_a_hook_is_refused(hooks: Any) -> None:
    """The error says to pass an instance of the class."""
    with pytest.raises(
        HookRegistrationError, match=r"got type Silent; pass an .* Silent\(\.\.\.\)"
    ):
        make_trainer(hooks, max_step=1)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    """The error has the shape and the remedy instead of torch's message about gradients."""

    def losses(model: torch.nn.Module, batch: Any) -> tuple[Any, torch.Tensor]:
        return None, model(batch[0]).square()

    processor = SimpleBatchProcessor.from_callable(losses)
    with pytest.raises(BatchProcessorError, match=r"a loss of shape \(4, 2\); .* loss\.mean\(\)"):
        make_trainer(batch_processor=processor, max_step=1)()


def test_a_trainer_without_hooks_shows_its_losses(caplog: pytest.LogCaptureFixture) -> None:
    """None means the default hooks; an empty list or default_hooks=False means none."""

    def run(**options: Any) -> list[str]:
        model = make_model()
        trainer = HookBasedTrainer(
            Accelerator(cpu=True),
            model,
            make_loader(),
            SimpleBatchProcessor.from_callable(loss_of),
            sgd(model),
            max_step=3,
            **options,
        )
        caplog.clear()
        with caplog.at_level(logging.INFO):
            trainer()
        assert "no hook writes" not in caplog.text
        return [hook.name for hook in trainer.hooks.named_hooks()]

    names = ["OptimizerHook", "ProgressBarHook", "LossTracker", "MetricsLogger"]
    assert run() == names
    assert "epoch 1, step 3/3 (100 %), loss " in caplog.text
    assert run(hooks=None) == names
    assert run(hooks=[]) == run(default_hooks=False) == ["OptimizerHook"]
    assert "loss" not in caplog.text


@pytest.mark.parametrize(
    ("hooks", "names"),
    [
        ([LossTrackerConfig(), StatsMonitorConfig()], "LossTracker, StatsMonitor"),
        ([ValidationHookConfig()(dataloaders={"val": make_loader()})], "ValidationHook"),
        ([LossTrackerConfig(), MetricsLoggerConfig()], None),
    ],
)
def test_published_metrics_that_no_hook_writes_are_reported_at_the_start(
    hooks: Any, names: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning comes before the first step, and has the line to add."""
    seen: list[str] = []
    look = on("on_epoch", lambda args: seen.append(caplog.text))
    make_trainer([*hooks, look], max_step=1)()
    expected = f"no hook writes the metrics that {names} will publish; add MetricsLoggerConfig("
    assert (expected in seen[0]) is (names is not None)
