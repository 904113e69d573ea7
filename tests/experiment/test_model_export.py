"""Tests of ``export``: models without the training code, by torch.export and in ONNX."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from robo_orchard_lab.cli.main import main

MODULE = '''\
"""Models of a user."""

import torch
from torch.utils.data import Dataset

from robo_orchard_lab.pipeline import SimpleBatchProcessor


class Pairs(Dataset):
    def __init__(self, size: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, 3, 8, 8, generator=generator)
        self.states = torch.randn(size, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "state": self.states[index]}


class TwoInputs(torch.nn.Module):
    """Convolution with batch norm, a second input, and outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4 + 5, 2)

    def forward(self, image, *, state):
        features = self.norm(self.conv(image)).relu().mean((2, 3))
        logits = self.head(torch.cat([features, state], 1))
        return {"logits": logits, "features": features}


class Fixed(TwoInputs):
    """The batch size is written into the model."""

    def forward(self, image, *, state):
        outputs = super().forward(image, state=state)
        return {name: value.reshape(8, -1) for name, value in outputs.items()}


class Noisy(TwoInputs):
    """Other outputs in each call."""

    def forward(self, image, *, state):
        outputs = super().forward(image, state=state)
        return {name: value + torch.rand_like(value) for name, value in outputs.items()}


class Loss(TwoInputs):
    """Returns its loss, as a policy does."""

    def forward(self, image, *, state):
        return super().forward(image, state=state)["logits"].square().mean()


class LossProcessor(SimpleBatchProcessor):
    def forward(self, model, batch):
        return None, model(batch["image"], state=batch["state"])


class Processor(SimpleBatchProcessor):
    def forward(self, model, batch):
        outputs = model(batch["image"], state=batch["state"])
        return outputs, outputs["logits"].square().mean()


class PartsProcessor(SimpleBatchProcessor):
    """Never calls the model itself."""

    def forward(self, model, batch):
        return None, model.head.weight.square().mean()
'''
EXPERIMENT = """\
name: pairs
model: {class_type: "pairs_models:TwoInputs"}
data:
  train: {dataset: {class_type: "pairs_models:Pairs"}, batch_size: 8}
  evaluation:
    val: {dataset: {class_type: "pairs_models:Pairs", size: 20}, batch_size: 8}
batch_processor: {class_type: "pairs_models:Processor"}
optimizer: {class_type: "torch.optim:SGD", lr: 0.1}
trainer: {max_step: 3}
"""
RUN = "runs/pairs"
TRUST = ("--trust", "pairs_models")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an experiment and its module."""
    (tmp_path / "pairs_models.py").write_text(MODULE)
    (tmp_path / "pairs.yaml").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train(*options: str) -> None:
    assert main(["train", "pairs.yaml", *TRUST, *options]) == 0


def export(*options: str) -> int:
    return main(["export", RUN, "--data", "val", *TRUST, *options])


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return (
        torch.randn(size, 3, 8, 8, generator=generator),
        torch.randn(size, 5, generator=generator),
    )


def live(size: int) -> dict[str, torch.Tensor]:
    """Return the outputs of the trained model."""
    from pairs_models import TwoInputs  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    model = TwoInputs().eval()
    model.load_state_dict(load_file(f"{RUN}/checkpoints/last/model.safetensors"))
    image, state = inputs(size)
    with torch.no_grad():
        found: dict[str, torch.Tensor] = model(image, state=state)
    return found


def test_torch_export_and_onnx_run_without_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """Both files give the outputs of the live model for other batch sizes than the data's."""
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    train()
    capsys.readouterr()
    assert export("--format", "torch-export", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["inputs"] == [[-1, 3, 8, 8], [-1, 5]]
    assert printed["batch_sizes"] == [8, 4, 1]
    assert export("--format", "onnx") == 0
    program = torch.export.load("model.pt2").module()
    session = onnxruntime.InferenceSession("model.onnx")
    names = [each.name for each in session.get_inputs()]
    for size in (1, 3, 17):
        image, state = inputs(size)
        expected = live(size)
        for name, value in program(image, state=state).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
        arrays = {names[0]: image.numpy(), names[1]: state.numpy()}
        for found, value in zip(session.run(None, arrays), expected.values(), strict=True):
            np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--model.class_type=pairs_models:Fixed"], "torch.export can't export Fixed"),
        (["--model.class_type=pairs_models:Noisy"], "does the model use random numbers"),
        (["--batch_processor.class_type=pairs_models:PartsProcessor"], "calls the model"),
        (["--data.evaluation.val.batch_size=1"], "at least 2 samples"),
        (
            [
                "--model.class_type=pairs_models:Loss",
                "--batch_processor.class_type=pairs_models:LossProcessor",
            ],
            "a row for each sample",
        ),
    ],
    ids=["fixed batch", "random outputs", "no call", "batch of one", "loss"],
)
def test_an_export_that_would_be_wrong_is_refused(
    options: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says what is wrong, and no file is written."""
    train(*options)
    capsys.readouterr()
    assert export("--format", "torch-export") != 0
    error = capsys.readouterr().err
    assert match in error
    assert "Traceback" not in error
    assert not Path("model.pt2").exists()


def test_an_existing_file_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """Only --force replaces a file; a wrong ending and an unknown set are errors."""
    train()
    Path("model.pt2").write_text("mine")
    assert export("--format", "torch-export") == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert export("--format", "onnx", "--out", "model.pt2", "--force") == 2
    assert "ends in .onnx" in capsys.readouterr().err
    assert main(["export", RUN, "--data", "vall", "--format", "onnx", *TRUST]) == 2
    assert "did you mean 'val'?" in capsys.readouterr().err
    assert Path("model.pt2").read_text() == "mine"


def test_predictions_in_parquet_have_a_row_for_each_sample() -> None:
    """Arrays become lists of a fixed size; the values are those of the safetensors file."""
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    train()
    for name in ("p.parquet", "p.safetensors"):
        assert main(["predict", RUN, "--data", "val", "--out", name, *TRUST]) == 0
    table, tensors = pq.read_table("p.parquet"), load_file("p.safetensors")
    assert table.column_names == ["index", "logits", "features"]
    for name in table.column_names:
        assert torch.equal(torch.tensor(table[name].to_pylist()), tensors[name])
