"""Policies in folders: saved, loaded without trainer and dataset, and exported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from reaching_policy import ReachPolicy
from robo_orchard_core.utils.config import ConfigError, TrustError
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineConfigError, StateError
from robo_orchard_lab.pipeline.model_card import ModelCardConfig
from robo_orchard_lab.policy import (
    BehaviorCloning,
    DiffusionPolicy,
    export_policy,
    load_policy,
    save_policy,
)

STATISTICS = {
    name: {"mean": [0.25] * size, "std": [1.5] * size, "min": [-2.0] * size, "max": [2.0] * size}
    for name, size in {"observation.state": 6, "action": 3}.items()
}
OBSERVATION = {"observation.state": torch.linspace(-2, 2, 12).reshape(2, 6)}
POLICIES: dict[str, Any] = {
    "behavior cloning": lambda: BehaviorCloning(STATISTICS, hidden=[16, 8]),
    "diffusion": lambda: DiffusionPolicy(STATISTICS, channels=[16, 32], noise_levels=10),
}


def predicted(policy: Any) -> torch.Tensor:
    torch.manual_seed(5)
    actions: torch.Tensor = policy.predict_actions(OBSERVATION)
    return actions


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_a_saved_policy_is_loaded_with_equal_actions(make: Any, tmp_path: Path) -> None:
    """Class, arguments, weights and statistics come back, without further trust."""
    policy = make().eval()
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    assert type(loaded) is type(policy)
    assert not loaded.training
    assert torch.equal(predicted(loaded), predicted(policy))
    assert json.loads((tmp_path / "policy" / "config.json").read_text()) == policy.config
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_a_saved_policy_has_a_card(tmp_path: Path) -> None:
    """The card has the license that the caller sets, and the code that loads the policy."""
    policy = BehaviorCloning(STATISTICS, hidden=[8])
    save_policy(policy, tmp_path / "policy", ModelCardConfig(license="mit", name="mine"))
    card = ModelCard.load(tmp_path / "policy" / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "robotics")
    assert "load_policy(" in card.text
    assert "\n# mine\n" in card.text


def test_a_program_of_torch_export_predicts_equal_actions(tmp_path: Path) -> None:
    """The exported policy returns the same actions for any number of rows."""
    policy = BehaviorCloning(STATISTICS, hidden=[16]).eval()
    export_policy(policy, tmp_path / "policy.pt2", OBSERVATION)
    program = torch.export.load(tmp_path / "policy.pt2").module()
    torch.manual_seed(0)
    for rows in (1, 2, 5):
        observation = {"observation.state": 3 * torch.randn(rows, 6)}
        assert torch.equal(program(observation), policy.predict_actions(observation))


def test_a_strangers_folder_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class outside the catalogue is not imported, unless the caller trusts its module."""
    save_policy(ReachPolicy(gain=0.5), tmp_path)
    monkeypatch.delitem(sys.modules, "reaching_policy")
    with pytest.raises(TrustError, match="reaching_policy"):
        load_policy(tmp_path)
    assert "reaching_policy" not in sys.modules
    assert load_policy(tmp_path, trust="reaching_policy").gain.item() == 0.5
    assert load_policy(tmp_path, trust=["reaching_policy:ReachPolicy"]).gain.item() == 0.5


def broken(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _other_weights(folder: Path) -> None:
    broken(folder, hidden=[4])


def _unknown_argument(folder: Path) -> None:
    broken(folder, hiddens=[4])


def _no_policy(folder: Path) -> None:
    (folder / "config.json").write_text('{"class_type": "torch.nn:Linear", "in_features": 1, '
                                        '"out_features": 2}')  # fmt: skip


def _too_large(folder: Path) -> None:
    broken(folder, hidden=[10**9, 10**9])


def _transformers(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _empty(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "other weights": (_other_weights, StateError, "weights of another policy"),
    "unknown argument": (_unknown_argument, ConfigError, "did you mean 'hidden'"),
    "no policy": (_no_policy, ConfigError, "expected a policy with predict_actions"),
    "too large": (_too_large, StateError, "weights of another policy"),
    "another format": (_transformers, ConfigError, "expected 'class_type' .* found model_type"),
    "cut": (_cut, CheckpointError, "model.safetensors"),
    "no weights": (_no_weights, CheckpointError, "model.safetensors"),
    "empty": (_empty, ConfigError, "expected a folder with config.json and model.safetensors"),
}


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_an_error(
    damage: Any, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    """The error names the file and the problem."""
    save_policy(BehaviorCloning(STATISTICS, hidden=[8]), tmp_path)
    damage(tmp_path)
    with pytest.raises(kind, match=message):
        load_policy(tmp_path)


def test_a_policy_that_can_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    """Without a config, and with NaN weights, nothing is written."""
    with pytest.raises(ValueError, match="expected a policy with config"):
        save_policy(torch.nn.Linear(1, 1), tmp_path / "a")
    policy = ReachPolicy(gain=float("nan"))
    policy.config = {"class_type": "reaching_policy:ReachPolicy"}
    with pytest.raises(ValueError, match="expected finite weights, found NaN or infinity in gain"):
        save_policy(policy, tmp_path / "a")
    policy = ReachPolicy()
    policy.config["noise"] = torch.zeros(1)
    with pytest.raises(PipelineConfigError, match="can't be written as JSON"):
        save_policy(policy, tmp_path / "a")
    assert not (tmp_path / "a").exists()
