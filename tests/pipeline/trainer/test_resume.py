"""A saved and resumed run equals an uninterrupted run."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
    TrainerProgress,
)
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineStateError, StateError
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig, SaveCheckpointConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights

STEPS = 14  # two epochs of seven batches


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Draws from the RNGs of torch, NumPy and Python while loading."""

    def __len__(self) -> int:
        return 26  # the last batch has two samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(4) + np.random.rand() + random.random()
        return noise.float() + index / 10, torch.full((2,), float(index))


class Losses(PipelineHooks):
    """Records every loss in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []
        self.register_hook("on_step", HookContext.from_callable(after=self.add))

    def add(self, args: PipelineHookArgs) -> None:
        if args.loss is not None:
            self.losses.append(args.loss)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=30)


LR_SCHEDULERS: dict[str, Any] = {
    "one_cycle": one_cycle,
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5),
    "multi_step": lambda o: MultiStepLR(o, [2, 4], gamma=0.5),
    "none": None,
}


def build(
    max_step: int,
    resume_from: Path | None = None,
    workers: int = 0,
    schedule: str = "one_cycle",
    accumulate: int = 3,
) -> tuple[HookBasedTrainer, Losses]:
    model = torch.nn.Sequential(make_model(), torch.nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = Losses()
    make_scheduler = LR_SCHEDULERS[schedule]
    torch.manual_seed(11)  # seeds of a fresh run; a resumed run must ignore its seeds
    if resume_from is not None:
        torch.manual_seed(999)
        np.random.seed(999)
        random.seed(999)
    else:
        np.random.seed(11)
        random.seed(11)
    trainer = HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        model,
        DataLoader(
            Augmented(),
            batch_size=4,
            shuffle=True,
            num_workers=workers,
            worker_init_fn=seed_worker,
            generator=torch.Generator().manual_seed(3 if resume_from is None else 4),
        ),
        SimpleBatchProcessor.from_callable(loss_of),
        optimizer,
        make_scheduler and make_scheduler(optimizer),
        [GradientClippingHookConfig(max_norm=0.5), losses],
        max_step=max_step,
        resume_from=resume_from,
    )
    return trainer, losses


def seed_worker(worker: int) -> None:
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def outcome(trainer: HookBasedTrainer, losses: Losses) -> dict[str, Any]:
    assert trainer.optimizer is not None
    return {
        "weights": weights(trainer.model),
        "losses": losses.losses,
        "optimizer": [
            value
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ],
        "rates": [torch.tensor(group["lr"]) for group in trainer.optimizer.param_groups],
        "random": [torch.rand(3), torch.tensor([np.random.rand(), random.random()])],
    }


def check_same(resumed: dict[str, Any], uninterrupted: dict[str, Any]) -> None:
    for part, expected in uninterrupted.items():
        assert equal(resumed[part], expected), part


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_stopped_at_any_commit_point_resumes_exactly(
    stop: int, workers: int, tmp_path: Path
) -> None:
    """Within and between windows and epochs, with any number of workers, the resume is exact."""
    trainer, losses = build(STEPS, workers=workers)
    trainer()
    uninterrupted = outcome(trainer, losses)
    progress = trainer.progress

    first, _ = build(STEPS, workers=workers)
    stop_after(first, stop)
    first.save_checkpoint(tmp_path / "checkpoint")
    second, losses = build(STEPS, tmp_path / "checkpoint", workers=workers)
    assert second.progress == first.progress
    second()
    assert second.progress == progress
    check_same(outcome(second, losses), uninterrupted)


class AugmentedStream(IterableDataset[Any]):
    """Seven batches without a length that draw random numbers in this process."""

    def __iter__(self) -> Any:
        for index in range(26):
            yield torch.rand(4) + index / 10, torch.full((2,), float(index))


def build_from_stream(resume_from: Path | None = None) -> HookBasedTrainer:
    torch.manual_seed(11 if resume_from is None else 999)
    model = torch.nn.Sequential(make_model(1), torch.nn.Dropout(0.3))
    torch.manual_seed(12 if resume_from is None else 999)
    return make_trainer(
        model=model,
        loader=DataLoader(AugmentedStream(), batch_size=4),
        data_order=DataOrder(fast_forward=True),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        accumulate=3,
        max_step=STEPS,
        resume_from=resume_from,
    )


def stop_after(trainer: HookBasedTrainer, step: int) -> None:
    """Run until `step` by a request, since a limit would shorten the window."""

    def ask(args: PipelineHookArgs) -> None:
        if args.global_step_id == step - 1:
            args.requests.stop("time is up")

    asking = PipelineHooks()
    asking.register_hook("on_step", HookContext.from_callable(after=ask))
    handle = trainer.hooks.register_pipeline_hooks(asking)
    trainer()
    handle.remove()
    assert trainer.progress.global_step_id == step


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_windows_loaded_in_advance_resume_exactly(stop: int, tmp_path: Path) -> None:
    """A stop within a window loaded before its first step resumes exactly."""
    uninterrupted = build_from_stream()
    uninterrupted()
    first = build_from_stream()
    stop_after(first, stop)
    first.save_checkpoint(tmp_path / "a")
    second = build_from_stream(tmp_path / "a")
    second()
    assert second.progress == uninterrupted.progress
    assert equal(weights(second.model), weights(uninterrupted.model))


@pytest.mark.parametrize("stop", [4, 7, 9])
def test_a_resumed_run_can_be_saved_again_at_once(stop: int, tmp_path: Path) -> None:
    """Saved again before training, a resumed run keeps its state, open window included."""
    trainer, losses = build(STEPS)
    trainer()
    uninterrupted = outcome(trainer, losses)
    first, _ = build(STEPS)
    stop_after(first, stop)
    first.save_checkpoint(tmp_path / "a")
    build(STEPS, tmp_path / "a")[0].save_checkpoint(tmp_path / "b")
    second, losses = build(STEPS, tmp_path / "b")
    second()
    check_same(outcome(second, losses), uninterrupted)


def test_changing_accumulation_within_a_window_is_refused(tmp_path: Path) -> None:
    """Within a window the number of accumulation steps can't change; between windows, it can."""
    first, _ = build(STEPS, accumulate=3)
    stop_after(first, 4)
    first.save_checkpoint(tmp_path / "open")
    with pytest.raises(StateError, match="window of 3 batches, which can't continue with 2"):
        build(STEPS, tmp_path / "open", accumulate=2)
    first, _ = build(STEPS, accumulate=3)
    stop_after(first, 6)
    first.save_checkpoint(tmp_path / "closed")
    build(STEPS, tmp_path / "closed", accumulate=2)[0]()


@pytest.mark.parametrize("stop", [2, 5])
def test_persistent_workers_are_exact_too(stop: int, tmp_path: Path) -> None:
    """Random numbers drawn by persistent workers depend on the batch, not on the worker's age."""

    def trainer(resume_from: Path | None = None) -> HookBasedTrainer:
        loader = DataLoader(Augmented(), 8, shuffle=True, num_workers=1, persistent_workers=True)
        torch.manual_seed(3 if resume_from is None else 999)
        return make_trainer(loader=loader, max_step=8, resume_from=resume_from)

    uninterrupted, first = trainer(), trainer()
    uninterrupted()
    stop_after(first, stop)
    first.save_checkpoint(tmp_path / "a")
    second = trainer(tmp_path / "a")
    second()
    assert equal(weights(second.model), weights(uninterrupted.model))


class Counting(torch.nn.Module):
    """Scales by the number of calls, in a buffer excluded from its state."""

    calls: torch.Tensor
    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("cache", torch.zeros(0), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.cache = torch.ones(int(self.calls))
        outputs: torch.Tensor = self.inner(inputs)
        return outputs / self.calls


def test_non_persistent_buffers_are_restored(tmp_path: Path) -> None:
    """Non-persistent buffers are restored if their shape is unchanged, and otherwise ignored."""
    uninterrupted = make_trainer(model=Counting(), max_step=6)
    uninterrupted()
    first = make_trainer(model=Counting(), max_step=3)
    first()
    first.save_checkpoint(tmp_path / "a")
    second = make_trainer(model=Counting(), max_step=6, resume_from=tmp_path / "a")
    second()
    assert equal(weights(second.model), weights(uninterrupted.model))
    assert "calls" not in load_checkpoint(tmp_path / "a").parts["model"]


@pytest.mark.parametrize("schedule", LR_SCHEDULERS)
def test_every_lr_scheduler_is_resumed(schedule: str, tmp_path: Path) -> None:
    """The complete state of each LR scheduler is restored, infinities included."""
    trainer, losses = build(STEPS, schedule=schedule, accumulate=1)
    trainer()
    uninterrupted = outcome(trainer, losses)
    first, _ = build(9, schedule=schedule, accumulate=1)
    first()
    first.save_checkpoint(tmp_path / "checkpoint")
    second, losses = build(STEPS, tmp_path / "checkpoint", schedule=schedule, accumulate=1)
    second()
    check_same(outcome(second, losses), uninterrupted)


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    """Resumed after its end, a run opens no scope and keeps its counters and weights."""
    first = make_trainer(max_epoch=2)
    first()
    first.save_checkpoint(tmp_path / "a")
    opened: list[int] = []
    hooks = PipelineHooks()
    hooks.register_hook("on_loop", HookContext.from_callable(before=lambda args: opened.append(1)))
    second = make_trainer(hooks, model=make_model(seed=5), max_epoch=2, resume_from=tmp_path / "a")
    second()
    assert opened == []
    assert second.progress == TrainerProgress(2, 0, 14, 14)
    assert equal(weights(second.model), weights(first.model))


def test_an_epoch_saved_open_is_closed(tmp_path: Path) -> None:
    """A resumed loader without a length finds its epoch exhausted and begins the next epoch."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.ones(4), torch.ones(2))] * 3)

    def trainer(**options: Any) -> HookBasedTrainer:
        order = DataOrder(fast_forward=True)
        return make_trainer(loader=DataLoader(Stream()), data_order=order, **options)

    first = trainer(max_step=3)
    first()
    assert first.progress.epoch_id == 0
    first.save_checkpoint(tmp_path / "a")
    second = trainer(max_step=4, resume_from=tmp_path / "a")
    second()
    assert second.progress == TrainerProgress(1, 1, 4, 4)


def test_weights_stand_alone(tmp_path: Path) -> None:
    """Weights load into a plain model, also those of a compiled model with tied parameters."""

    def tied() -> torch.nn.Module:
        inner = torch.nn.Linear(2, 2)
        return torch.nn.Sequential(make_model(), inner, torch.nn.Tanh(), inner)

    model = tied()
    compiled: Any = torch.compile(model, backend="eager")
    trainer = make_trainer(
        model=compiled, optimizer=torch.optim.AdamW(model.parameters()), max_step=2
    )
    trainer()
    trainer.save_checkpoint(tmp_path / "deep" / "a")
    fresh = tied()
    fresh.load_state_dict(load_file(tmp_path / "deep" / "a" / "model.safetensors"))
    assert equal(weights(fresh), weights(model))
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a"]


def test_parameter_groups_in_another_order_load_correctly(tmp_path: Path) -> None:
    """Optimizer state is matched by name, so groups and parameters may be reordered."""

    def trainer(flipped: bool, resume_from: Path | None = None) -> HookBasedTrainer:
        model = make_model()
        first, _, last = model.children()
        groups = [
            {"params": list(first.parameters()), "lr": 0.1},
            {"params": list(last.parameters()), "lr": 0.2},
        ]
        if flipped:
            groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]  # type: ignore[index]  # a list
        optimizer = torch.optim.AdamW(groups)
        return make_trainer(
            model=model,
            optimizer=optimizer,
            max_step=9 if resume_from else 5,
            resume_from=resume_from,
        )

    uninterrupted = trainer(flipped=False)
    uninterrupted()
    uninterrupted.save_checkpoint(tmp_path / "a")
    resumed = {flipped: trainer(flipped, tmp_path / "a") for flipped in (False, True)}
    for run in resumed.values():
        run()
    optimizer = resumed[True].optimizer
    assert optimizer is not None
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert equal(weights(resumed[True].model), weights(resumed[False].model))


def save(folder: Path, **options: Any) -> None:
    trainer = make_trainer(max_step=2, **options)
    trainer()
    trainer.save_checkpoint(folder)


class OtherModel(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2, bias=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: {"model": OtherModel()},
            r"model is different: unexpected: 2\.bias; 0\.weight: saved as float32\[8, 4\], here ",
        ),
        (lambda: {"hooks": Losses()}, "registered but not saved: Losses"),
        (
            lambda: {"lr_scheduler": "step"},
            "expected the lr_scheduler of the saved run, none; found StepLR",
        ),
        (
            lambda: {"optimizer": "adam"},
            "expected the optimizer of the saved run, SGD; found AdamW",
        ),
        (lambda: {"optimizer": "half"}, r"parameter group .* saved in other groups: 0\.bias"),
        (lambda: {"optimizer": "two groups"}, "parameter group that was not saved"),
        (
            lambda: {"loader": DataLoader(Augmented(), 4, generator=torch.Generator())},
            r"generators \[\] when the run was saved, and has \['loader\.generator'\]",
        ),
    ],
)
def test_the_state_of_another_run_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    """The error names the mismatch, and neither the model nor the optimizer is changed."""
    save(tmp_path / "a")
    options = change()
    model = options.pop("model", None) or make_model(5)
    kind = options.pop("optimizer", None)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.7)
    if kind == "half":
        optimizer = torch.optim.SGD(next(model.children()).parameters(), lr=0.7)
    elif kind == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.7)
    elif kind == "two groups":
        optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.7)
    if "lr_scheduler" in options:
        options["lr_scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = weights(model)
    with pytest.raises(StateError, match=message):
        make_trainer(
            model=model, optimizer=optimizer, max_step=3, resume_from=tmp_path / "a", **options
        )
    assert equal(weights(model), before)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert not optimizer.state


def test_a_missing_saved_group_is_named(tmp_path: Path) -> None:
    """An optimizer with fewer groups than saved is refused with the missing parameters."""
    model = make_model()
    save(
        tmp_path / "a",
        model=model,
        optimizer=torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1),
    )
    model = make_model()
    with pytest.raises(StateError, match=r"lacks saved parameter groups, with 0\.bias, 2\.bias"):
        make_trainer(
            model=model,
            optimizer=torch.optim.SGD([next(model.parameters())], lr=0.1),
            max_step=3,
            resume_from=tmp_path / "a",
        )


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "changed"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    """Any changed file is named, and no live object is modified."""
    save(tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"manifest.json", "model.safetensors", "optimizer.json", "trainer.json"} < {*names}
    for name in names:
        path = tmp_path / "a" / name
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            changed = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
            wrong = {"empty": b"", "cut": content[: len(content) // 2], "changed": changed}
            path.write_bytes(wrong[damage])
        model = make_model(5)
        before = weights(model)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            make_trainer(model=model, max_step=3, resume_from=tmp_path / "a")
        assert equal(weights(model), before)
        path.write_bytes(content)
    make_trainer(max_step=3, resume_from=tmp_path / "a")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("trainer", {"version": 7}, "trainer state of version 4, found 7"),
        ("trainer", {"extra": 1}, r"expected in the trainer's state: .*; found: data, extra"),
        ("trainer", {"processes": 2}, "expected the states of 2 ranks, found 1"),
        (
            "trainer",
            {"progress": {"version": 9}},
            "the progress of version 1, found version 9",
        ),
        (
            "state",
            {"extra": 1},
            "in the state of a rank: .*; found: beside, buffers, data, extra",
        ),
        ("state", {"hooks": {"Other": {}}}, "saved but not registered: Other"),
    ],
)
def test_an_unknown_state_is_refused(
    part: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Unknown versions and parts are refused by name."""
    save(tmp_path / "a")
    saved = load_checkpoint(tmp_path / "a")
    parts, of_rank = dict(saved.parts), dict(saved.rank_parts)
    holder = parts if part == "trainer" else of_rank
    holder[part] = {**holder[part], **change}
    save_checkpoint(tmp_path / "b", 2, parts, of_rank)
    with pytest.raises(StateError, match=message):
        make_trainer(max_step=3, resume_from=tmp_path / "b")


def test_hook_states_are_rolled_back_when_one_is_refused(tmp_path: Path) -> None:
    """Earlier hooks get their previous states back if a later hook refuses its state."""

    class Picky(Losses):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            if len(state["losses"]) == 2:
                raise StateError("too few losses")
            super().load_state_dict(state)

    save(tmp_path / "a", hooks=[Losses(), Picky()])
    first, second = Losses(), Picky()
    model = make_model(5)
    before = weights(model)
    with pytest.raises(StateError, match="too few losses"):
        make_trainer([first, second], model=model, max_step=3, resume_from=tmp_path / "a")
    assert first.losses == second.losses == []
    assert equal(weights(model), before)


def test_a_hook_that_refuses_its_state_is_named(tmp_path: Path) -> None:
    """The first error propagates with the hook's name, even if the rollback is refused too."""

    class Refusing(Losses):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            raise ValueError(f"not {len(state['losses'])} losses")

    save(tmp_path / "a", hooks=[Losses(), Refusing()])
    first = Losses()
    with pytest.raises(ValueError, match="not 2 losses") as raised:
        make_trainer([first, Refusing()], max_step=3, resume_from=tmp_path / "a")
    assert "raised in hook 'Refusing' (load_state_dict)" in raised.value.__notes__
    assert first.losses == []


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_a_run_folder_is_not_a_checkpoint(folder: str, tmp_path: Path) -> None:
    """A run folder and its checkpoints folder are refused, and the error names a checkpoint."""
    make_trainer(SaveCheckpointConfig(), max_step=2, run_folder=tmp_path)()
    meant = tmp_path / "checkpoints" / "last"
    with pytest.raises(CheckpointError, match=f"found a directory of checkpoints, .* {meant}"):
        make_trainer(max_step=3, resume_from=tmp_path / folder)
    trainer = make_trainer(SaveCheckpointConfig(), max_step=3, resume_from=meant)
    assert trainer.progress.global_step_id == 2


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """A missing checkpoint is an error, not a fresh start."""
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere"):
        make_trainer(max_step=3, resume_from=tmp_path / "nowhere")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Saving to an existing path is refused and leaves it unchanged."""
    save(tmp_path / "a")
    content = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    with pytest.raises(FileExistsError, match="name a new directory"):
        save(tmp_path / "a")
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == content


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    """The error names the path of a value that can't be saved, and no file stays behind."""

    class Odd(PipelineHooks):
        def state_dict(self) -> dict[str, Any]:
            return {"nested": [1, {2}]}

    with pytest.raises(StateError, match=r"hooks\.Odd\.nested\.1 can't be saved: .*found set"):
        save(tmp_path / "a", hooks=Odd())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError while writing removes the files written so far."""
    trainer = make_trainer(max_step=2)
    trainer()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.save_checkpoint(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_saving_and_calling_are_refused_within_a_step(tmp_path: Path) -> None:
    """A hook can neither save nor start the trainer, and a failed trainer can't resume."""
    trainer = make_trainer(max_step=2)
    hooks = PipelineHooks()
    hooks.register_hook(
        "on_step",
        HookContext.from_callable(before=lambda args: trainer.save_checkpoint(tmp_path / "a")),
    )
    handle = trainer.hooks.register_pipeline_hooks(hooks)
    with pytest.raises(PipelineStateError, match=r"middle of a step; save after .*requests\.save"):
        trainer()
    handle.remove()
    with pytest.raises(PipelineStateError, match="where it failed or was called from"):
        trainer()
    with pytest.raises(PipelineStateError, match="middle of a step"):
        trainer.save_checkpoint(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [3, 5, 10, 15])
def test_a_stop_at_the_end_of_an_epoch_keeps_the_order(
    stop: int, accumulate: int, tmp_path: Path
) -> None:
    """A loader with its own generator resumes in the same order, wherever a hook stops the run."""

    def run(
        resume_from: Path | None = None, stop_at: int | None = None, max_step: int | None = None
    ) -> tuple[HookBasedTrainer, list[float]]:
        seen: list[float] = []
        hooks = PipelineHooks("record")
        hooks.on_step.before(lambda args: seen.append(args.batch[0][0, 0].item()))
        if stop_at is not None:

            @hooks.on_step.after(when=f"at steps {stop_at}")
            def stop_here(args: PipelineHookArgs) -> None:
                args.requests.stop("enough")

        generator = torch.Generator().manual_seed(3)
        trainer = make_trainer(
            [hooks],
            loader=make_loader(5, shuffle=True, generator=generator),
            accumulate=accumulate,
            max_epoch=4,
            max_step=max_step,
            resume_from=resume_from,
        )
        trainer()
        return trainer, seen

    _, uninterrupted = run()
    for name in ("stop_at", "max_step"):
        trainer, first = run(**{name: stop})  # type: ignore[arg-type]  # both are numbers
        assert len(first) == stop
        trainer.save_checkpoint(tmp_path / name)
        _, rest = run(resume_from=tmp_path / name)
        assert first + rest == uninterrupted


class LearnedLoss(SimpleBatchProcessor):
    """Weights its loss by a parameter of its own, outside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, model: torch.nn.Module, batch: Any) -> Any:
        outputs, loss = loss_of(model, batch)
        return outputs, loss * self.weight - self.weight.log()


def learned(resume_from: Path | None = None, **options: Any) -> tuple[HookBasedTrainer, Any]:
    model, processor = make_model(), LearnedLoss()
    groups = [{"params": [*model.parameters()]}, {"params": [processor.weight]}]
    trainer = make_trainer(
        model=model,
        batch_processor=processor,
        optimizer=torch.optim.AdamW(groups, lr=0.05),
        accumulate=3,
        resume_from=resume_from,
        **options,
    )
    return trainer, processor


@pytest.mark.parametrize("stop", [3, 4])
def test_parameters_outside_the_model_are_resumed(stop: int, tmp_path: Path) -> None:
    """A learned loss resumes with its parameters, within a window and between windows."""
    uninterrupted, expected = learned(max_step=8)
    uninterrupted()
    first, _ = learned(max_step=8)
    stop_after(first, stop)
    first.save_checkpoint(tmp_path / "a")
    second, found = learned(tmp_path / "a", max_step=8)
    second()
    assert equal([found.weight], [expected.weight])
    assert found.weight != 1.0
    assert equal(weights(second.model), weights(uninterrupted.model))
    with pytest.raises(StateError, match=r"parameter groups, with group1\.param0"):
        make_trainer(
            optimizer=torch.optim.AdamW((model := make_model()).parameters()),
            model=model,
            accumulate=3,
            max_step=8,
            resume_from=tmp_path / "a",
        )
