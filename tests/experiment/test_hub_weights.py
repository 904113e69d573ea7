"""Weights from the Hugging Face Hub, by a stand-in on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hub_stand_in import HubStandIn, hub_stand_in
from robo_orchard_lab.experiment.initial_weights import load_weights
from robo_orchard_lab.pipeline.errors import CheckpointError


def net(value: float = 0.0) -> torch.nn.Linear:
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, value)
    return layer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """Stand-in with a repository of two branches, and an empty cache."""
    files = {
        "model.safetensors": save(net(2.0).state_dict()),
        "ema.safetensors": save(net(3.0).state_dict()),
        "unet/diffusion_pytorch_model.safetensors": save(net(4.0).state_dict()),
        **{f"{name}.safetensors": b"" for name in ("model.fp16", "unet/model.fp16")},
        **dict.fromkeys(("pytorch_model.bin", "old/pytorch_model.bin", "train.py"), b""),
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_stand_in() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        server.add("me/net", files)
        first = {"model.safetensors": save(net(1.0).state_dict())}
        server.repos["me/net"].commit("v1", first, "first")
        yield server


def sent(hub: HubStandIn) -> list[str]:
    """Return the files that the stand-in sent."""
    paths = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    return [path.split("/", 5)[5] for path in paths]


def loaded(source: str) -> tuple[float, str]:
    """Return the first weight after loading, and the path of the source in the report."""
    model = net()
    report = load_weights(model, source)
    return model.weight[0, 0].item(), report.source


def test_weights_of_the_hub_are_loaded(hub: HubStandIn) -> None:
    """Only the model's safetensors file is downloaded, once; the report names the commit."""
    value, source = loaded("hub:me/net")
    assert (value, sent(hub)) == (2.0, ["model.safetensors"])
    assert hub.repos["me/net"].branches["main"] in source
    assert loaded("hub:me/net@v1")[0] == 1.0
    assert loaded("hub:me/net@main")[0] == 2.0
    assert sent(hub) == ["model.safetensors"] * 2, "a file of the cache is not downloaded again"


def test_a_folder_or_a_file_of_a_repository_is_loaded(hub: HubStandIn) -> None:
    """A part of a Diffusers pipeline, and one of several files, are named after the repository."""
    commit = hub.repos["me/net"].branches["main"]
    assert loaded("hub:me/net/unet")[0] == 4.0
    assert loaded(f"hub:me/net/ema.safetensors@{commit}")[0] == 3.0
    assert sent(hub) == ["unet/diffusion_pytorch_model.safetensors", "ema.safetensors"]


def test_a_cached_commit_needs_no_network(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the downloaded weights are a source, and others are an error."""
    loaded("hub:me/net@v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert loaded("hub:me/net@v1")[0] == 1.0
    with pytest.raises(CheckpointError, match="hub:me/other can't be downloaded"):
        loaded("hub:me/other")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:me/other", "can't be downloaded.*check the name"),
        ("hub:me/net@v9", "can't be downloaded.*[Rr]evision"),
        ("hub:me/net/old", r"has no old/model\.safetensors; pickled weights are not read"),
        ("hub:me/net/none.safetensors", r"has no none\.safetensors"),
        ("hub:net", "expected hub:OWNER/NAME"),
        ("hub:../../etc", "can't be downloaded"),
        ("hub:me/net/../../x", "expected hub:OWNER/NAME"),
        ("hub:", "expected hub:OWNER/NAME"),
    ],
)
def test_what_the_hub_lacks_is_an_error(hub: HubStandIn, source: str, message: str) -> None:
    """The error names the reference and the remedy, and no pickle is downloaded."""
    with pytest.raises(CheckpointError, match=message):
        loaded(source)
    assert not sent(hub)
