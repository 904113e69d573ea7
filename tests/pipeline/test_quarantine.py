"""Non-finite windows written by the guard, and their replay."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, SimpleBatchProcessor
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHooks
from robo_orchard_lab.pipeline.hooks.non_finite_guard import NonFiniteError, NonFiniteGuardConfig
from robo_orchard_lab.pipeline.quarantine import pack_batch, read_window, replay, unpack_batch
from tiny import equal, make_loader


class Model(torch.nn.Module):
    """Model with dropout, running statistics, frozen and evaluating parts, and a hidden buffer."""

    hidden: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.second = torch.nn.Linear(8, 2)
        self.first.bias.requires_grad_(False)
        self.still = torch.nn.Dropout(0.9).eval()
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.hidden += 1
        hidden = torch.nn.functional.dropout(self.still(self.norm(self.first(inputs))), 0.5)
        outputs: torch.Tensor = self.second(hidden) * self.hidden
        return outputs


class Processor(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        outputs = model(batch["inputs"])
        loss = torch.nn.functional.mse_loss(outputs, batch["targets"])
        return outputs, loss + math.inf if batch.get("bad") else loss


Batches = list[dict[str, Any]]


def make_batches(bad: Sequence[int]) -> Batches:
    return [
        {"inputs": inputs, "targets": targets, "bad": index in bad, "ids": torch.arange(4) + index}
        for index, (inputs, targets) in enumerate(make_loader())
    ]


class Watch(PipelineHooks):
    """Hook that records the losses and the gradient norm of each window."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor | None] = []
        self.register_hook("on_batch", HookContext.from_callable(after=self.note_loss))
        self.register_hook("on_optimizer_step", HookContext.from_callable(after=self.note_norm))

    def note_loss(self, args: PipelineHookArgs) -> None:
        assert args.loss is not None
        self.losses.append(args.loss)

    def note_norm(self, args: PipelineHookArgs) -> None:
        self.norms.append(args.grad_norm)


class WeightedProcessor(Processor):
    """Processor that returns a loss weight; the loss is NaN if the weight is 0."""

    def forward(self, model: Any, batch: Any) -> Any:
        outputs, loss = super().forward(model, batch)
        weight = batch["weight"]
        return outputs, loss if weight > 0 else loss + math.nan, weight


def train(
    folder: Path,
    batches: Any,
    *hooks: Any,
    accumulate: int = 1,
    precision: str = "no",
    model: torch.nn.Module | None = None,
    processor: type[SimpleBatchProcessor] = Processor,
    **fields: Any,
) -> HookBasedTrainer:
    model = Model() if model is None else model
    guard = NonFiniteGuardConfig(**{"policy": "skip", "quarantine": folder, **fields})
    trainer = HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision),
        model,
        batches,
        processor(),
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01),
        hooks=[*hooks, guard],
        max_epoch=1,
    )
    torch.manual_seed(11)
    trainer()
    return trainer


def other_model() -> Model:
    """Return a model with different weights, modes and buffers."""
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1).requires_grad_(True)
    model.hidden += 7
    model.still.train()
    return model


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("bad", [{"bad": [4]}, {"nan": 4}])
def test_replay_equals_the_run(bad: dict[str, Any], clip: bool, tmp_path: Path) -> None:
    """Each loss and the gradient norm equal the run's, with dropout and accumulation."""
    batches = make_batches(bad.get("bad", []))
    if "nan" in bad:
        batches[bad["nan"]]["inputs"][0, 0] = math.nan
    watch = Watch()
    hooks = [watch, *([GradientClippingHookConfig(max_norm=0.1)] if clip else [])]
    train(tmp_path / "q", batches, *hooks, accumulate=3, sample_ids="ids")
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["step_00000005"]

    model = other_model()
    before = torch.get_rng_state()
    replayed = replay(tmp_path / "q" / "step_00000005", model, Processor())
    assert torch.equal(torch.get_rng_state(), before)
    assert replayed.is_identical
    expected, norm = watch.losses[3:6], watch.norms[1]
    assert norm is not None
    for ours, theirs in zip(replayed.losses, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(replayed.grad_norm, norm, rtol=0, atol=0, equal_nan=True)
    assert norm.isfinite() == ("bad" in bad)
    assert model.first.bias.grad is None
    assert model.second.weight.grad is not None
    assert not model.still.training

    steps = replayed.window.steps
    assert [step.global_step_id for step in steps] == [3, 4, 5]
    assert [step.finite for step in steps] == [True, False, True]
    assert steps[1].sample_ids == [4, 5, 6, 7]
    assert [step.loss_divisor for step in steps] == [3.0] * 3
    assert replayed.window.progress["optimizer_step_id"] == 1


@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_are_replayed_with_their_weights(accumulate: int, tmp_path: Path) -> None:
    """Weights may be numbers or tensors, some of them zero."""
    batches = make_batches([4])
    for batch, weight in zip(batches, [1, 1, 1, 7.0, torch.tensor(300), 0, 1], strict=True):
        batch["weight"] = weight
    watch = Watch()
    train(tmp_path, batches, watch, accumulate=accumulate, processor=WeightedProcessor)
    (folder,) = tmp_path.iterdir()
    replayed = replay(folder, other_model(), WeightedProcessor())
    assert replayed.is_identical
    norm = watch.norms[4 // accumulate]
    assert norm is not None
    assert norm.isfinite()
    assert torch.equal(replayed.grad_norm, norm)
    given = [step.loss_weight for step in replayed.window.steps]
    expected = [7.0, 300.0, 0.0] if accumulate == 3 else [300.0]
    assert [weight.item() for weight in given if weight is not None] == expected


def test_different_batch_is_not_identical(tmp_path: Path) -> None:
    """A replay with a different batch is not identical."""
    batches = make_batches([2])
    train(tmp_path / "q", batches)
    folder = tmp_path / "q" / "step_00000002"
    assert replay(folder, Model(), Processor()).is_identical
    assert replay(folder, Model(), Processor(), batches=[batches[2]]).is_identical
    assert not replay(folder, Model(), Processor(), batches=[batches[3]]).is_identical
    with pytest.raises(ValueError, match="the window has 1 steps, got 2 batches"):
        replay(folder, Model(), Processor(), batches=batches[:2])


def test_raised_window_has_the_weights_before_it(tmp_path: Path) -> None:
    """The error names the folder and the call to replay it."""
    batches = make_batches([5])
    model = Model()
    with pytest.raises(
        NonFiniteError, match=r"samples 5, 6, 7 and 1 more\..*replay\('.*q/step_00000005', model"
    ) as raised:
        train(tmp_path / "q", batches, policy="raise", sample_ids="ids", model=model)
    assert raised.value.folder == tmp_path / "q" / "step_00000005"
    window = read_window(raised.value.folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(window.weights[name], parameter)
    assert window.weights["hidden"] == model.hidden - 1
    assert replay(raised.value.folder, Model(), Processor()).is_identical


def test_late_reading_loses_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Batches and RNG states are saved; the replay uses the model's weights."""
    batches = make_batches([3])
    watch = Watch()
    with pytest.raises(NonFiniteError, match=r"step_00000003'") as raised:
        train(tmp_path / "q", batches, watch, policy="raise", read="one update late")
    assert raised.value.folder is not None
    window = read_window(raised.value.folder)
    assert window.weights == {}
    assert [step.global_step_id for step in window.steps] == [3]
    assert window.progress["optimizer_step_id"] == 3

    until = Model()
    train(tmp_path / "none", batches[:3], model=until)  # the weights that the window began with
    replayed = replay(raised.value.folder, until, Processor())
    assert "the weights of the window were not saved" in caplog.text
    assert replayed.is_identical
    assert torch.equal(replayed.grad_norm, watch.norms[3])  # type: ignore[arg-type]  # a tensor


def test_replay_requires_the_runs_precision(tmp_path: Path) -> None:
    """A bf16 run is identical with a bf16 accelerator, and refused without."""
    train(tmp_path / "q", make_batches([1]), precision="bf16")
    folder = tmp_path / "q" / "step_00000001"
    with pytest.raises(ValueError, match=r"mixed_precision='bf16', the replay has 'no'; pass acc"):
        replay(folder, Model(), Processor())
    bf16 = Accelerator(cpu=True, mixed_precision="bf16")
    assert replay(folder, other_model(), Processor(), accelerator=bf16).is_identical


def test_replay_uses_the_loss_scale(tmp_path: Path) -> None:
    """The loss scale of an fp16 run is saved, and the gradients are unscaled."""

    def scale(args: PipelineHookArgs) -> None:
        args.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)

    starting = PipelineHooks("starting")
    starting.register_hook("on_loop", HookContext.from_callable(before=scale))
    with pytest.raises(NonFiniteError):
        train(tmp_path / "q", make_batches([0]), starting, policy="raise")
    folder = tmp_path / "q" / "step_00000000"
    assert read_window(folder).loss_scale == 2.0**120
    replayed = replay(folder, Model(), Processor())
    assert replayed.is_identical
    assert 0.1 < replayed.grad_norm < 100
    assert replayed.window.grad_norm is None


def test_unsupported_values_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training continues, everything else is saved, and a replay requests the batches."""
    batches = make_batches([2])
    batches[2]["transform"] = make_batches
    batches[2]["path"] = [Path("a")]
    trainer = train(tmp_path / "q", batches)
    assert trainer.progress.skipped_optimizer_steps == 1
    folder = tmp_path / "q" / "step_00000002"
    lost = "steps[0].batch['transform'] (function), steps[0].batch['path'][0] (PosixPath)"
    assert f"{folder} lacks values that can't be saved: {lost}" in caplog.text
    window = read_window(folder)
    assert torch.equal(window.steps[0].batch["inputs"], batches[2]["inputs"])
    assert window.steps[0].batch["transform"] is None
    with pytest.raises(StateError, match=r"could not be saved: steps\[0\].batch\['transform'\]"):
        replay(folder, Model(), Processor())
    assert replay(folder, Model(), Processor(), batches=[batches[2]]).is_identical


def test_batch_that_breaks_saving_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tensor that no file can hold loses the batches, not the rest."""
    batches = make_batches([2])
    batches[2]["odd"] = torch.zeros(2, dtype=torch.bits8)
    train(tmp_path / "q", batches)
    assert "the batches can't be written and are left out" in caplog.text
    window = read_window(tmp_path / "q" / "step_00000002")
    assert window.unsaved == ["steps[0].batch"]
    assert window.steps[0].batch is None
    assert window.weights


def test_unwritable_folder_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An unwritable folder is logged, and named in the error of policy "raise"."""
    (tmp_path / "q").write_text("a file")
    trainer = train(tmp_path / "q", make_batches([2]))
    assert trainer.progress.skipped_optimizer_steps == 1
    assert f"could not write {tmp_path}/q/step_00000002" in caplog.text
    with pytest.raises(NonFiniteError, match="The batches were not written; the log says why"):
        train(tmp_path / "q", make_batches([2]), policy="raise")


def test_max_quarantined_limits_windows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first windows stay; later ones are logged and not written, also by a second run."""
    train(tmp_path / "q", make_batches([1, 3, 4]), max_quarantined=2)
    names = ["step_00000001", "step_00000003"]
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == names
    assert f"{tmp_path}/q holds 2 windows already (max_quarantined)" in caplog.text
    before = (tmp_path / "q" / names[0] / "window.json").stat().st_mtime_ns
    train(tmp_path / "q", make_batches([1, 4]), max_quarantined=2)
    assert f"{tmp_path}/q/step_00000001 exists already; not overwritten" in caplog.text
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == names
    assert (tmp_path / "q" / names[0] / "window.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("key", "expected"),
    [("ids", [2, 3, 4, 5]), ("names", ["a", "None"]), ("one", ["x"]), ("none", None), (3, None)],
)
def test_sample_ids(
    key: str | int, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ids of any kind become ints or strings; a missing key is a warning."""
    batches = make_batches([2])
    for batch in batches:
        batch |= {"names": ("a", None), "one": "x", "none": None}
    train(tmp_path / "q", batches, sample_ids=key)
    assert read_window(tmp_path / "q" / "step_00000002").steps[0].sample_ids == expected
    assert ("there are no sample ids under 3" in caplog.text) == (key == 3)


def test_resumed_window_lacks_its_start(tmp_path: Path) -> None:
    """The steps since the resume are saved, with the number of missing ones."""
    stopping = PipelineHooks("stopping")
    stopping.register_hook(
        "on_step",
        HookContext.from_callable(
            after=lambda args: (
                args.requests.stop("test", by="test") if args.global_step_id in (3, 9) else None
            )
        ),
    )
    batches = make_batches([5])
    train(tmp_path / "q", batches, stopping, accumulate=3).save_checkpoint(tmp_path / "saved")
    model = Model()
    guard = NonFiniteGuardConfig(policy="skip", quarantine=tmp_path / "q")
    HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=3),
        model,
        batches,
        Processor(),
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01),
        hooks=[stopping, guard],
        max_epoch=1,
        resume_from=tmp_path / "saved",
    )()
    replayed = replay(tmp_path / "q" / "step_00000005", Model(), Processor())
    assert replayed.window.steps_missing == 1
    assert [step.global_step_id for step in replayed.window.steps] == [4, 5]
    assert [step.finite for step in replayed.window.steps] == [True, False]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    """Another model, version or kind of folder has an error of its own."""
    train(tmp_path / "q", make_batches([2]))
    folder = tmp_path / "q" / "step_00000002"
    with pytest.raises(
        StateError,
        match=r"of another model: missing: 0.weight; .*unexpected: first.weight",
    ):
        replay(folder, torch.nn.Sequential(torch.nn.Linear(4, 2)), Processor())
    wide = Model()
    wide.second = torch.nn.Linear(8, 3)
    with pytest.raises(StateError, match=r"second.weight: saved as \(2, 8\), here \(3, 8\)"):
        replay(folder, wide, Processor())
    parts = dict(load_checkpoint(folder).parts)
    parts["window"]["quarantine_version"] = 7
    save_checkpoint(tmp_path / "other", 2, parts)
    with pytest.raises(StateError, match="window of version 2, found version 7"):
        replay(tmp_path / "other", Model(), Processor())
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        replay(tmp_path / "q" / "step_00000003", Model(), Processor())


class Point(NamedTuple):
    x: torch.Tensor
    y: int


def test_batches_round_trip() -> None:
    """Values, tensors and arrays are equal, memory layouts included."""
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    batch = OrderedDict(
        image=image,
        turned=torch.randn(3, 4).t(),
        array=np.arange(6, dtype=np.float32).reshape(2, 3),
        number=np.float32(1.5),
        odd=np.array(["a"]),
        names=("a", None, True, math.inf),
        nested=[{0: torch.ones(()), "lost": 1}],
        point=Point(torch.ones(1), 2),
    )
    lost: list[str] = []
    packed = pack_batch(batch, lost)
    assert lost == ["batch['odd'] (ndarray)"]
    back = unpack_batch(packed)
    assert type(back) is dict
    assert list(back) == list(batch)
    for name in ("image", "turned"):
        assert torch.equal(back[name], batch[name])  # type: ignore[arg-type]  # a tensor
        assert back[name].stride() == batch[name].stride()  # type: ignore[attr-defined]  # a tensor
    assert np.array_equal(back["array"], batch["array"])  # type: ignore[arg-type]  # an array
    assert back["number"] == 1.5
    assert back["odd"] is None
    assert back["names"] == ("a", None, True, math.inf)
    assert back["nested"] == [{0: torch.ones(()), "lost": 1}]
    assert type(back["point"]) is tuple
    assert equal([back["point"][0]], [torch.ones(1)])
