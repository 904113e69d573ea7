"""Files and commands of docs/how_to/fine_tuning.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robo_orchard_lab.cli.main import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/how_to/fine_tuning.md").read_text("utf-8")
FILES = dict(re.findall(r"```yaml\n# ([\w.]+)\n(.*?)```", PAGE, re.S))
COMMANDS = re.findall(r"^\$ (.*)$", PAGE, re.M)


def last(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run, "checkpoints/last/model.safetensors"))


# torch warns once when it traces a module that gets an output of another one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_page_fine_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands succeed, in order; the run records the loaded weights, keeps frozen
    ones, and continues without its source.
    """
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, "utf-8")
    for line in COMMANDS:
        words = shlex.split(line)
        assert words.pop(0) == "robo-orchard-lab"
        assert main(words) == 0
    record = json.loads(Path("runs/finetune/starts/0001.json").read_text())["initial_weights"]
    assert record["step"] == 20
    assert record["weights"] == "ema"
    assert record["skipped"].keys() == {"layers.4.weight", "layers.4.bias"}
    assert [len(digest) for digest in record["digests"].values()] == [32]
    assert last("runs/finetune")["layers.4.weight"].shape == (5, 16)
    assert main(["train", "pretrain.yaml", "--from", "runs/pretrain"]) == 2  # a run of its own

    Path("runs/pretrain").rename("moved")
    before = last("runs/finetune")
    assert main(["train", "finetune.yaml", "--trainer.max_epoch", "3"]) == 0
    assert not torch.equal(last("runs/finetune")["layers.2.weight"], before["layers.2.weight"])
    number = len(list(Path("runs/finetune/starts").glob("*.json")))
    start = json.loads(Path(f"runs/finetune/starts/000{number}.json").read_text())
    assert start["initial_weights"] is None
