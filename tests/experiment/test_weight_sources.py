"""Weights that other libraries wrote, from real files of these libraries."""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_lab.experiment.initial_weights import load_weights
from robo_orchard_lab.experiment.weight_sources import weights_file
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError


def net(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def assert_loaded(path: Path | str, expected: torch.nn.Module, **options: Any) -> None:
    """Load a source into a model with other values, and compare all entries."""
    model = net(seed=1)
    report = load_weights(model, path, **options)
    assert not report.missing
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def run_command(error: Exception, cwd: Path) -> None:
    """Run the command at the end of an error, as a shell would."""
    command = str(error)[str(error).index(": python -") + 2 :]
    for part in command.split(" && "):
        program, *arguments = shlex.split(part)
        assert program == "python"
        subprocess.run(
            [sys.executable, *arguments], cwd=cwd, check=True, capture_output=True, timeout=300
        )


# --- Accelerate ------------------------------------------------------------------------------


def test_a_state_of_accelerate_is_loaded(tmp_path: Path) -> None:
    """The folder of ``save_state`` has the weights of the first model."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(net())
    accelerator.prepare(torch.nn.Linear(3, 3))
    accelerator.save_state(str(tmp_path / "state"))
    assert (tmp_path / "state" / "model_1.safetensors").is_file()
    assert_loaded(tmp_path / "state", model)


def test_a_model_of_accelerate_is_loaded_from_shards(tmp_path: Path) -> None:
    """``save_model`` splits a model over files; their index joins them."""
    accelerator = Accelerator(cpu=True)
    wide = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    accelerator.save_model(wide, str(tmp_path), max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*-of-*.safetensors")]) > 1
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    assert len(load_weights(model, tmp_path).loaded) == 4
    assert torch.equal(model.state_dict()["1.weight"], wide.state_dict()["1.weight"])


def test_a_pickled_state_of_accelerate_is_refused_with_a_command(tmp_path: Path) -> None:
    """The command of the error converts the weights, and the folder is a source."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(net())
    folder = tmp_path / "pickled 'state'"
    accelerator.save_state(str(folder), safe_serialization=False)
    with pytest.raises(CheckpointError, match="found pickled weights") as caught:
        load_weights(net(), folder)
    run_command(caught.value, tmp_path)
    assert_loaded(folder, model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_refused_with_a_command(tmp_path: Path) -> None:
    """The shards of FSDP, in torch's format, are joined and converted by the command."""
    folder = tmp_path / "state" / "pytorch_model_fsdp_0"
    save_distributed({"model": net().state_dict()}, checkpoint_id=folder)  # as Accelerate does
    (tmp_path / "state" / "optimizer_0").mkdir()
    with pytest.raises(CheckpointError, match=f"name one: {folder}$"):
        load_weights(net(), tmp_path / "state")
    with pytest.raises(CheckpointError, match="distributed checkpoint of torch") as caught:
        load_weights(net(), folder)
    run_command(caught.value, tmp_path)
    assert_loaded(folder, net())


# --- Lightning -------------------------------------------------------------------------------

LIGHTNING = """
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
        )
        self.loss = torch.nn.CrossEntropyLoss(weight=torch.ones(2))

    def training_step(self, batch, index):
        return self.loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[ModelCheckpoint(dirpath="checkpoints", save_last=True)],
)
net = Net()
trainer.fit(net, DataLoader(data, batch_size=4))
torch.save(net.model.state_dict(), "expected.pt")
"""


def test_a_checkpoint_of_lightning_is_refused_with_a_command(tmp_path: Path) -> None:
    """The command converts the file, and the next error names the prefix of the module."""
    pytest.importorskip("pytorch_lightning")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIGHTNING],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=300,
    )
    last = tmp_path / "checkpoints" / "last.ckpt"
    for path in (last, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match="pickle may run code and is not read") as caught:
            load_weights(net(), path)
    assert f"name {last.with_suffix('.safetensors')}: python -c" in str(caught.value)
    run_command(caught.value, tmp_path)
    expected = net()
    expected.load_state_dict(torch.load(tmp_path / "expected.pt", weights_only=True))
    converted = last.with_suffix(".safetensors")
    with pytest.raises(StateError, match=r"write rename: {'model\.': ''}"):
        load_weights(net(), converted)
    assert_loaded(converted, expected, rename={"model.": ""})


# --- Transformers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))


def assert_transformer_loaded(path: Path, expected: Any) -> None:
    model = type(expected)(expected.config)
    torch.nn.init.zeros_(model.transformer.wte.weight)
    assert not load_weights(model, path).missing
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_checkpoint_of_the_transformers_trainer_is_loaded(
    transformer: Any, tmp_path: Path
) -> None:
    """``checkpoint-N`` is a source; the folder above is an error that names the newest first."""
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    out = tmp_path / "out"
    arguments = transformers.TrainingArguments(
        str(out), max_steps=10, save_steps=2, save_total_limit=2, use_cpu=True, report_to=[],
        disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    transformers.Trainer(transformer, arguments, train_dataset=data).train()
    assert_transformer_loaded(out / "checkpoint-10", transformer)
    newest = f"name one: {out / 'checkpoint-10'}, {out / 'checkpoint-8'}$"
    with pytest.raises(CheckpointError, match=newest):
        load_weights(net(), out)


def test_a_folder_of_transformers_is_loaded_from_shards(transformer: Any, tmp_path: Path) -> None:
    """``save_pretrained`` splits a model over files; tied weights are stored once."""
    transformer.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert_transformer_loaded(tmp_path, transformer)


def test_pickled_shards_of_transformers_are_refused_with_a_command(
    transformer: Any, tmp_path: Path
) -> None:
    """All shards of an older folder become one file."""
    state = {name: value.clone() for name, value in transformer.state_dict().items()}
    names = sorted(state)
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    torch.save({name: state[name] for name in names[::2]}, tmp_path / files[0])
    torch.save({name: state[name] for name in names[1::2]}, tmp_path / files[1])
    torch.save({}, tmp_path / "training_args.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text("{}")
    for path in (tmp_path, index):
        with pytest.raises(CheckpointError, match="found pickled weights") as caught:
            load_weights(net(), path)
    run_command(caught.value, tmp_path)
    assert_transformer_loaded(tmp_path, transformer)


# --- folders and names -----------------------------------------------------------------------


def test_a_folder_with_one_file_of_another_name_is_loaded(tmp_path: Path) -> None:
    """The only safetensors file is the source; of several, the error names them."""
    from safetensors.torch import save_file

    save_file(net().state_dict(), tmp_path / "policy.safetensors")
    assert_loaded(tmp_path, net())
    shutil.copy(tmp_path / "policy.safetensors", tmp_path / "critic.safetensors")
    with pytest.raises(CheckpointError, match=r"name one: critic.safetensors, policy.safetensors"):
        load_weights(net(), tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": torch.ones(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="an adapter of PEFT"):
        load_weights(net(), adapter)


def test_a_folder_inside_a_run_is_not_the_run(tmp_path: Path) -> None:
    """Pickled weights below a run folder are refused; the checkpoint of the run is not taken."""
    (tmp_path / "config.yaml").write_text("name: x")
    (tmp_path / "starts").mkdir()
    (tmp_path / "old").mkdir()
    torch.save(net().state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="found pickled weights"):
        load_weights(net(), tmp_path / "old")


@pytest.mark.parametrize("name", ["last.ckpt", "pytorch_model_fsdp.bin", "old.pt", ".metadata"])
def test_no_pickle_is_read(name: str, tmp_path: Path) -> None:
    """A file that runs code when unpickled is refused by its name, alone and in its folder."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Evil()))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Evil()))
    for path in (folder / name, folder):
        with pytest.raises((CheckpointError, ValueError)):
            load_weights(net(), path)
    assert not (tmp_path / "executed").exists()


def test_a_prefix_that_matches_more_entries_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Entries that stay as they are because of a prefix are a warning with the remedy."""
    from safetensors.torch import save_file

    renamed = {f"model.{n}" if n[0] == "2" else n: v for n, v in net().state_dict().items()}
    save_file(renamed, tmp_path / "net.safetensors")
    load_weights(net(), tmp_path / "net.safetensors")
    assert "write rename: {'model.': ''}" in caplog.text
    caplog.clear()
    load_weights(net(), tmp_path / "net.safetensors", rename={"model.": ""})
    assert "rename" not in caplog.text


def test_names_of_wrappers_of_compiled_modules_are_plain(tmp_path: Path) -> None:
    """Names with the prefixes of DDP and ``torch.compile`` need one rename."""
    from safetensors.torch import save_file

    wrapped = {f"module._orig_mod.{n}": v for n, v in net().state_dict().items()}
    save_file(wrapped, tmp_path / "net.safetensors")
    assert_loaded(tmp_path / "net.safetensors", net(), rename={"module.": ""})


def test_other_paths_are_not_files_of_others(tmp_path: Path) -> None:
    """An empty folder, and a folder of checkpoints of a run, have no files of other programs."""
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "manifest.json").touch()
    (tmp_path / "step_00000001" / "model.safetensors").touch()
    assert weights_file(tmp_path) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"or a folder with \*\.safetensors files$"):
        load_weights(net(), tmp_path / "empty")
