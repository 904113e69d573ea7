"""Load weights to begin with into a model that is sharded over the ranks."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from robo_orchard_lab.experiment.initial_weights import load_weights


def full_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    before = full_values(model)
    report = load_weights(model, sys.argv[1], on_mismatch={"1.*": "overlap"})
    after, saved = full_values(model), load_file(sys.argv[1])
    assert torch.equal(after["0.weight"], saved["0.weight"])
    assert torch.equal(after["1.weight"][:3], saved["1.weight"])
    assert torch.equal(after["1.weight"][3:], before["1.weight"][3:])
    assert report.loaded == ("0.weight", "0.bias")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
