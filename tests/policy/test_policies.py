"""Properties that all policies share."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from robo_orchard_core.utils.config import Trust
from robo_orchard_core.utils.config.references import resolve
from robo_orchard_lab.policy import ACT, BehaviorCloning, DiffusionPolicy, Policy, PolicyProcessor
from robo_orchard_lab.policy.pretrained import export_policy
from robot_batches import CHUNK, make_batch, make_statistics

CAMERAS = ("front", "wrist")
SMALL_ACT = {"dim": 16, "heads": 2, "feedforward_dim": 16, "encoder_layers": 1, "latent_dim": 4}

Make = Callable[..., Policy]


def make_cloning(**arguments: Any) -> Policy:
    return BehaviorCloning(make_statistics(), hidden=[32, 32], **arguments)


def make_diffusion(**arguments: Any) -> Policy:
    sizes: dict[str, Any] = {"channels": [16, 32], "condition_dim": 16, "inference_steps": 5}
    return DiffusionPolicy(make_statistics(), **{**sizes, **arguments})


def make_act(**arguments: Any) -> Policy:
    pytest.importorskip("torchvision")
    return ACT(make_statistics(cameras=CAMERAS), **{**SMALL_ACT, **arguments})


every_policy = pytest.mark.parametrize("make", [make_cloning, make_diffusion, make_act])


def batch_of(policy: Policy, **arguments: Any) -> dict[str, torch.Tensor]:
    return make_batch(cameras=CAMERAS if isinstance(policy, ACT) else (), **arguments)


def loss_of(policy: Policy, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    loss: torch.Tensor = policy(batch)
    return loss


@every_policy
def test_policy_learns_a_batch(make: Make) -> None:
    """The loss of one batch falls, by half within 40 updates, and gradients reach all layers."""
    torch.manual_seed(0)
    is_act = make is make_act  # its ResNet is slow
    policy = make(dropout=0.0) if is_act else make()
    batch = batch_of(policy)
    loss_of(policy, batch).backward()
    unused = [name for name, p in policy.named_parameters() if p.grad is None]
    assert unused == []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3 if is_act else 3e-3)
    first = loss_of(policy, batch).item()
    for _ in range(2 if is_act else 40):
        optimizer.zero_grad()
        loss_of(policy, batch).backward()
        optimizer.step()
    assert loss_of(policy, batch).item() < (first if is_act else first / 2)


@every_policy
def test_predicted_actions_are_chunks_in_raw_units(make: Make) -> None:
    """A prediction has shape (B, T, A), no gradient, and the statistics' units."""
    torch.manual_seed(0)
    policy = make()
    actions = policy.predict_actions(batch_of(policy, size=64))
    assert actions.shape == (64, CHUNK, 2)
    assert not actions.requires_grad
    policy.action_normalizer.offset += 1000.0
    torch.manual_seed(0)
    moved = policy.predict_actions(batch_of(policy, size=64))
    assert (moved - actions).mean().item() == pytest.approx(1000.0, abs=5.0)


@every_policy
def test_prediction_uses_evaluation_mode_and_restores_training_mode(make: Make) -> None:
    """A policy in training mode predicts as in evaluation mode, and stays in training mode."""
    policy = make()
    batch = batch_of(policy)
    torch.manual_seed(1)
    in_training = policy.train().predict_actions(batch)
    assert policy.training
    assert all(module.training for module in policy.modules())
    torch.manual_seed(1)
    torch.testing.assert_close(policy.eval().predict_actions(batch), in_training, rtol=0, atol=0)
    assert not policy.training


@pytest.mark.parametrize("make", [make_cloning, make_act])
def test_values_of_padding_have_no_effect(make: Make) -> None:
    """Actions after the end of an episode change neither the loss nor what the encoder sees."""
    policy = make().eval()
    batch = batch_of(policy)
    is_padding = batch["action_is_pad"].unsqueeze(-1)
    other = {**batch, "action": batch["action"].masked_fill(is_padding, 77.0)}
    torch.testing.assert_close(loss_of(policy, other), loss_of(policy, batch))


@pytest.mark.parametrize("make", [make_cloning, make_diffusion])
def test_loss_is_the_mean_over_frames_without_padding(make: Make) -> None:
    """Losses of complementary masks, weighted by their frames, add up to the loss of all."""
    policy = make()
    batch = batch_of(policy)
    mask = batch.pop("action_is_pad")
    kept, rest = (loss_of(policy, {**batch, "action_is_pad": each}) for each in (mask, ~mask))
    frames, padded = mask.numel(), int(mask.sum())
    expected = loss_of(policy, batch) * frames
    torch.testing.assert_close(kept * (frames - padded) + rest * padded, expected)
    assert kept.item() != pytest.approx(rest.item(), rel=1e-3)


@every_policy
def test_config_rebuilds_the_policy(make: Make) -> None:
    """Class and arguments survive JSON, name every constructor argument, and rebuild the policy."""
    policy = make(n_action_steps=2).eval()
    arguments = json.loads(json.dumps(policy.config))
    cls: Any = resolve(arguments.pop("class_type"), Trust(frozenset({"robo_orchard_lab"})))
    rebuilt = cls(**arguments).eval()
    assert rebuilt.config == policy.config
    rebuilt.load_state_dict(policy.state_dict())
    batch = batch_of(policy)
    predicted = []
    for each in (policy, rebuilt):
        torch.manual_seed(2)
        predicted.append(each.predict_actions(batch))
    torch.testing.assert_close(predicted[0], predicted[1], rtol=0, atol=0)
    assert rebuilt.n_action_steps == 2


@every_policy
def test_config_has_every_argument(make: Make) -> None:
    """Each argument of a constructor is an entry of the config, so none is lost in an export."""
    policy = make()
    arguments = [*inspect.signature(type(policy)).parameters]
    assert {*policy.config} == {"class_type", *arguments}


def test_weight_of_a_loss_is_its_number_of_frames() -> None:
    """Two micro-batches weighted by their frames have the loss and gradient of one batch."""
    policy, processor = make_cloning(), PolicyProcessor()
    batch = batch_of(policy)
    total = torch.zeros(())
    frames = 0.0
    for half in (slice(0, 2), slice(2, 4)):
        outputs, loss, weight = processor.forward(policy, {n: v[half] for n, v in batch.items()})
        assert outputs is None
        total, frames = total + loss * weight, frames + float(weight)
    assert frames == 4 * CHUNK - 5
    torch.testing.assert_close(total / frames, processor.forward(policy, batch)[1])
    del batch["action_is_pad"]
    assert processor.forward(policy, batch)[2] == 4 * CHUNK


@every_policy
def test_policy_trains_under_ddp(make: Make, tmp_path: Path) -> None:
    """DistributedDataParallel wraps a policy: its forward pass is the loss, all parameters used."""
    policy = make()
    rendezvous = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(policy)
        for _ in range(2):  # the second pass fails if the first one left parameters unused
            _, loss, _ = PolicyProcessor().forward(model, batch_of(policy))
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert loss.shape == ()


def test_several_inputs_are_concatenated() -> None:
    """Vector features in `inputs` form the state, in their order and with their own statistics."""
    name = "observation.environment_state"
    statistics = make_statistics()
    statistics[name] = {"mean": [-7.0, -7.0], "std": [1.0, 1.0]}
    policy = BehaviorCloning(statistics, inputs=["observation.state", name], hidden=[])
    observation = {"observation.state": torch.full((1, 3), 3.0), name: torch.full((1, 2), -5.0)}
    assert policy.normalized_state(observation).tolist() == [[1.0, 1.0, 1.0, 2.0, 2.0]]
    assert policy.predict_actions(observation).shape == (1, CHUNK, 2)


def test_observations_are_clamped() -> None:
    """An observation beyond 5 standard deviations counts as 5."""
    policy = make_cloning()
    far = {"observation.state": torch.tensor([[1e9, -1e9, 1.0]])}
    assert policy.normalized_state(far).tolist() == [[5.0, -5.0, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_action_steps": 9}, "n_action_steps=9 and chunk_size=8"),
        ({"n_action_steps": 0}, "n_action_steps=0 and chunk_size=8"),
        ({"inputs": []}, "names of features in inputs"),
        ({"inputs": ["observation.joints"]}, "'observation.joints', found those of observation.st"),
        ({"statistics": {"observation.state": {"mean": [0.0], "std": [1.0]}}}, "of 'action'"),
    ],
)
def test_invalid_arguments_are_refused(arguments: Any, message: str) -> None:
    """An argument out of range and a feature without statistics are errors at construction."""
    with pytest.raises(ValueError, match=message):
        BehaviorCloning(**{"statistics": make_statistics(), **arguments})


def test_batches_of_another_shape_are_refused() -> None:
    """A missing feature, another size, a window and another chunk are errors with the remedy."""
    policy = make_cloning()
    batch = batch_of(policy)
    state, action = batch["observation.state"], batch["action"]
    cases = {
        "expected 'observation.state' in a batch, found action": {"action": action},
        r"state of shape \[batch, 3\], found \[4, 2\]": {
            **batch,
            "observation.state": state[:, :2],
        },
        "one frame, without delta timestamps": {**batch, "observation.state": state[:, None]},
        r"found \[4, 4, 2\]; set chunk_size: 8 of the dataset": {**batch, "action": action[:, :4]},
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=message):
            policy(other)


@pytest.mark.parametrize("make", [make_cloning, make_diffusion])
def test_exported_program_predicts_the_same_actions(make: Make, tmp_path: Path) -> None:
    """A policy can be exported by torch.export; the program serves any number of rows."""
    policy = (make(inference_steps=2) if make is make_diffusion else make()).eval()
    name = "observation.state"
    export_policy(policy, tmp_path / "policy.pt2", {name: torch.zeros(2, 3)})
    program = torch.export.load(tmp_path / "policy.pt2").module()
    predicted = []
    for predict in (program, policy.predict_actions):
        torch.manual_seed(3)
        predicted.append(predict({name: batch_of(policy, size=5)[name]}))
    torch.testing.assert_close(predicted[0], predicted[1])
