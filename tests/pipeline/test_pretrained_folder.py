"""Folders of exported models: card, config, and weights that ``from_pretrained`` reads."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks import EMAConfig, KeepBestConfig, SaveModelConfig
from robo_orchard_lab.pipeline.model_card import ModelCardConfig
from robo_orchard_lab.pipeline.run.durable import remove_leftovers, replace_folder
from robo_orchard_lab.policy import BehaviorCloning, PolicyProcessor, load_policy
from tiny import make_model, make_trainer, weights

SCRIPT = Path(__file__).parents[1] / "scripts" / "export_lerobot_policy.py"
LEROBOT = os.environ.get("LEROBOT_PYTHON") or (sys.executable if find_spec("lerobot") else "")
STATISTICS = {
    name: {"mean": [0.25] * size, "std": [1.5] * size, "min": [-2.0] * size, "max": [2.0] * size}
    for name, size in {"observation.state": 6, "action": 3}.items()
}
TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5"


class MeanOutput(SimpleBatchProcessor):
    """Loss of a model with one input, of any library."""

    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        outputs = model(**batch)
        return outputs, outputs[0].float().square().mean()


def trained(model: torch.nn.Module, batch: dict[str, Any], folder: Path, *hooks: Any) -> None:
    make_trainer(
        [*hooks],
        model=model,
        loader=[batch] * 3,
        batch_processor=MeanOutput(need_backward=True),
        max_epoch=1,
        run_folder=folder,
    )()
    model.eval()


def test_transformers_reads_its_model(tmp_path: Path) -> None:
    """A model with tied weights is read with equal outputs; so are the weights of its EMA."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=17, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.arange(8).reshape(1, 8)}
    ema = EMAConfig(decay=0.5)()
    of_ema = SaveModelConfig(weights="EMA", folder=tmp_path / "ema")()
    of_ema.name = "SaveAverage"
    trained(model, batch, tmp_path, ema, SaveModelConfig(), of_ema)
    read = transformers.GPT2LMHeadModel.from_pretrained
    loaded = read(tmp_path / "pretrained_model").eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    averaged = read(tmp_path / "ema").eval()
    assert not torch.equal(averaged(**batch).logits, model(**batch).logits)
    with ema.applied():
        assert torch.equal(averaged(**batch).logits, model(**batch).logits)
    card = ModelCard.load(tmp_path / "pretrained_model" / "README.md")
    assert card.data.library_name == "transformers"
    assert "GPT2LMHeadModel.from_pretrained(" in card.text


def test_diffusers_reads_its_model(tmp_path: Path) -> None:
    """A model whose weights have another file name is read with equal weights and outputs."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    batch = {"sample": torch.randn(1, 1, 8, 8), "timestep": 1}
    trained(model, batch, tmp_path, SaveModelConfig())
    folder = tmp_path / "pretrained_model"
    assert (folder / "diffusion_pytorch_model.safetensors").is_file()
    loaded = copy.deepcopy(diffusers.UNet2DModel.from_pretrained(folder).eval())
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    # Memory that the file is mapped to may have another alignment, and other kernels.
    torch.testing.assert_close(loaded(**batch).sample, model(**batch).sample, rtol=0, atol=1e-6)


@pytest.mark.skipif(not LEROBOT, reason="requires lerobot, or LEROBOT_PYTHON")
def test_lerobot_reads_its_policy(tmp_path: Path) -> None:
    """An ACT policy of lerobot, trained by the trainer, is read with equal actions."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(SCRIPT.parents[2] / "src"),
    }
    done = subprocess.run(
        [LEROBOT, str(SCRIPT), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "equal actions"
    card = ModelCard.load(tmp_path / "pretrained_model" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("lerobot", "robotics")


def test_card_has_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card has license, tags, results, command, versions and configuration, and no secrets."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HARMLESS", "value-of-the-environment")
    command = ["/home/anna/bin/python", "train.py", "--hub.token", TOKEN, "--at", "/home/anna/data"]
    monkeypatch.setattr(sys, "orig_argv", command)
    hooks = PipelineHooks("measures")

    @hooks.on_step.after
    def publish(args: PipelineHookArgs) -> None:
        args.metrics.publish("eval/val/loss", 0.125)
        args.metrics.publish("eval/val/none", float("nan"))
        args.requests.log("always")

    card = ModelCardConfig(license="apache-2.0", tags=["mine"], name="Good | model", language="en")
    make_trainer([hooks, SaveModelConfig(card=card)], max_step=2, run_folder=tmp_path / "first")()
    path = tmp_path / "first" / "pretrained_model" / "README.md"
    found = ModelCard.load(path)
    assert found.data.license == "apache-2.0"
    assert found.data.language == "en"
    assert found.data.tags == ["robo-orchard-hooks", "mine"]
    [result] = found.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("val", "loss", 0.125)
    assert found.data.model_name == "Good | model"
    text = path.read_text()
    assert "# Good \\| model\n" in text
    assert "| eval/val/loss | 0.125 |" in text
    assert "python train.py --hub.token '(removed)' --at ~/data" in text or (
        "python train.py --hub.token (removed) --at ~/data" in text
    )
    assert f"| torch | {torch.__version__} |" in text
    assert '"optimizer"' in text
    for secret in (TOKEN, "value-of-the-environment", "/home/anna", str(Path.home()) + "/"):
        assert secret not in text


def test_card_shows_the_experiment_without_secrets(tmp_path: Path) -> None:
    """The card has name, data and configuration of the experiment file; it ends no block early."""
    (tmp_path / "starts").mkdir()
    fence = "`" * 4
    data = f"{{root: /home/anna/robots, api_key: '{TOKEN}', size: null}}"
    (tmp_path / "config.yaml").write_text(
        f"name: good\ndata: {{train: {data}}}\ntext: '{fence} ![x](y)'\n"
    )
    make_trainer(SaveModelConfig(), max_step=1, run_folder=tmp_path)()
    card = ModelCard.load(tmp_path / "pretrained_model" / "README.md")
    assert "\n# good\n" in card.text
    assert '    root: "~/robots"\n    api_key: "(removed)"\n```' in card.text  # no null
    assert f"{fence}`yaml\nname: good\n" in card.text
    assert TOKEN not in card.text
    assert "/home/anna" not in card.text


@pytest.mark.parametrize("field", [{"license": "Apache 2.0"}, {"language": "English"}])
def test_wrong_fields_of_the_card_are_refused(field: dict[str, str]) -> None:
    """The error names the form that the Hub expects."""
    with pytest.raises(ValueError, match=r"expected an (identifier such as|ISO 639 code)"):
        SaveModelConfig.from_dict({"card": field})


def test_an_edited_card_and_other_files_stay(tmp_path: Path) -> None:
    """A second export replaces weights and its own card; other files, shards excepted, stay."""
    folder = tmp_path / "pretrained_model"
    make_trainer(SaveModelConfig(), max_step=1, run_folder=tmp_path)()
    first = (folder / "README.md").read_text()
    (folder / "README.md").write_text(first.replace("1 step", "MANY steps"))
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    save_file({"w": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
    save_file({"w": torch.ones(1)}, folder / "adapter.safetensors")
    model = make_model()
    make_trainer(SaveModelConfig(), model=model, max_step=2, run_folder=tmp_path)()
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "model.safetensors",
        "notes",
    ]
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert "2 steps" in (folder / "README.md").read_text()
    lines = (folder / "README.md").read_text().splitlines()
    (folder / "README.md").write_text("\n".join(lines[:-1]) + "\nmy own words\n")
    make_trainer(SaveModelConfig(), max_step=3, run_folder=tmp_path)()
    assert (folder / "README.md").read_text().endswith("my own words\n")


class Pickled(torch.nn.Linear):
    """Model that saves a pickle."""

    def save_pretrained(self, folder: Path) -> None:
        torch.save(self.state_dict(), folder / "pytorch_model.bin")


def test_pickles_are_refused(tmp_path: Path) -> None:
    """A model that writes a pickle ends the run, and leaves no folder."""
    with pytest.raises(PipelineConfigError, match=r"save_pretrained, found pytorch_model\.bin"):
        make_trainer(SaveModelConfig(), model=Pickled(4, 2), max_step=1, run_folder=tmp_path)()
    assert not (tmp_path / "pretrained_model").exists()
    assert not [*tmp_path.glob(".pretrained*")]


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    """A write that fails leaves the old folder; an interrupted replacement is restored."""
    folder = tmp_path / "model"

    def fail(new: Path) -> None:
        (new / "a").write_text("new")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_folder(folder, fail)
    assert [*tmp_path.iterdir()] == []
    replace_folder(folder, lambda new: (new / "a").write_text("old"))
    with pytest.raises(OSError, match="no space"):
        replace_folder(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "a").read_text() == "old"
    old, new = (tmp_path / f".model.{'0' * 32}.{end}" for end in ("old", "tmp"))
    folder.rename(old)  # as a kill between the two renames
    new.mkdir()
    remove_leftovers(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "a").read_text() == "old"


def test_best_policy_has_a_card(tmp_path: Path) -> None:
    """KeepBest writes the card next to a model.safetensors, with the best value."""
    policy = BehaviorCloning(STATISTICS, hidden=[8])
    path = tmp_path / "pretrained_model" / "model.safetensors"
    hooks = PipelineHooks("measures")

    @hooks.on_step.after
    def publish(args: PipelineHookArgs) -> None:
        args.metrics.publish("eval/pc_success", (10.0, 60.0, 20.0)[args.global_step_id])
        args.requests.log("always")

    batch = {"observation.state": torch.ones(2, 6), "action": torch.ones(2, policy.chunk_size, 3)}
    make_trainer(
        [hooks, KeepBestConfig(monitor="eval/pc_success", mode="max", path=path)],
        model=policy,
        loader=[batch] * 3,
        batch_processor=PolicyProcessor(need_backward=True),
        max_epoch=1,
        run_folder=tmp_path,
    )()
    card = ModelCard.load(path.with_name("README.md"))
    assert card.data.pipeline_tag == "robotics"
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("pc_success", 60.0)
    loaded = load_policy(tmp_path)
    assert all(torch.equal(a, load_file(path)[n]) for n, a in loaded.state_dict().items())
    assert weights(loaded)
