"""Script for a Python with lerobot: train an ACT policy by the trainer, and read its export.

python export_lerobot_policy.py FOLDER
"""

import sys
import warnings
from typing import Any

import torch
from accelerate import Accelerator

warnings.simplefilter("ignore")
from lerobot.configs.types import FeatureType, PolicyFeature  # noqa: E402
from lerobot.policies.act.configuration_act import ACTConfig  # noqa: E402
from lerobot.policies.act.modeling_act import ACTPolicy  # noqa: E402

from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor  # noqa: E402
from robo_orchard_lab.pipeline.hooks import SaveModelConfig  # noqa: E402

CHUNK = 4


class Act(SimpleBatchProcessor):
    """Loss of a policy of lerobot."""

    def forward(self, model: Any, batch: Any) -> tuple[None, torch.Tensor]:
        return None, model(batch)[0]


def main(folder: str) -> None:
    """Train three steps, export, and compare actions."""
    state = PolicyFeature(type=FeatureType.STATE, shape=(3,))
    config = ACTConfig(
        input_features={
            "observation.state": state,
            "observation.environment_state": PolicyFeature(type=FeatureType.ENV, shape=(2,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        latent_dim=4,
        device="cpu",
    )
    policy = ACTPolicy(config)
    observation = {
        "observation.state": torch.randn(2, 3),
        "observation.environment_state": torch.randn(2, 2),
    }
    batch = {
        **observation,
        "action": torch.randn(2, CHUNK, 2),
        "action_is_pad": torch.zeros(2, CHUNK, dtype=torch.bool),
    }
    HookBasedTrainer(
        Accelerator(cpu=True),
        policy,
        [batch] * 3,
        Act(need_backward=True),
        torch.optim.SGD(policy.parameters(), lr=0.01),
        hooks=[SaveModelConfig()],
        max_epoch=1,
        run_folder=folder,
    )()
    policy.eval()
    loaded = ACTPolicy.from_pretrained(f"{folder}/pretrained_model")
    expected = policy.predict_action_chunk(observation)
    assert torch.equal(loaded.predict_action_chunk(observation), expected)
    print("equal actions")


main(sys.argv[1])
