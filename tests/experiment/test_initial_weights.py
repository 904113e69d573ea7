"""Weights to begin with, from checkpoints and safetensors files."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from launching import SCRIPTS, launch
from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_lab.experiment.initial_weights import load_weights
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.hooks import EMAConfig, SaveCheckpointConfig


def net(outputs: int = 3, width: int = 4) -> nn.Module:
    parts = [("body", nn.Linear(2, width)), ("head", nn.Linear(width, outputs))]
    return nn.Sequential(OrderedDict(parts))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the weights of `net()`."""
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def saved(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_all_weights_of_a_file_are_loaded(file: Path) -> None:
    """The report names the entries and the file's digest."""
    model = net()
    report = load_weights(model, file)
    assert_equal(values(model), saved(file))
    assert report.loaded == ("body.weight", "body.bias", "head.weight", "head.bias")
    assert (report.missing, report.unused, report.step) == ((), (), None)
    assert len(report.digests["net.safetensors"]) == 32


def test_a_compiled_model_has_plain_names(file: Path) -> None:
    """Names are those without ``torch.compile``."""
    model = net()
    compiled: Any = torch.compile(model, backend="eager")
    load_weights(compiled, file)
    assert_equal(values(model), saved(file))


def test_a_new_head_keeps_its_values(file: Path) -> None:
    """Skipped and excluded entries stay; the table states the shapes."""
    model = net(outputs=5)
    before = values(model)
    report = load_weights(model, file, on_mismatch={"head.*": "skip"})
    after = values(model)
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert torch.equal(after["body.weight"], saved(file)["body.weight"])
    assert report.skipped["head.weight"] == "shape 3x4, expected 5x4"
    assert "skipped     2  head.weight (shape 3x4, expected 5x4)" in str(report)
    other = net()
    before = values(other)
    assert load_weights(other, file, exclude=["head.*"]).skipped["head.bias"] == "excluded"
    assert torch.equal(values(other)["head.bias"], before["head.bias"])


def test_another_shape_is_refused_before_a_change(file: Path) -> None:
    """All differences are listed, and the model stays as it was."""
    model = net(outputs=5)
    before = values(model)
    problem = r"head.weight \(shape 3x4, expected 5x4\); head.bias .*on_mismatch"
    with pytest.raises(StateError, match=problem):
        load_weights(model, file)
    assert_equal(values(model), before)


def test_a_rule_resizes(tmp_path: Path) -> None:
    """A larger vocabulary keeps the known rows, longer positions are interpolated."""
    old = nn.ModuleDict({"words": nn.Embedding(3, 2), "places": nn.Embedding(3, 2)})
    with torch.no_grad():
        old.get_parameter("places.weight").copy_(torch.tensor([[0.0, 2], [1, 4], [2, 0]]))
    save_file(old.state_dict(), tmp_path / "old.safetensors")
    new = nn.ModuleDict({"words": nn.Embedding(4, 2), "places": nn.Embedding(5, 2)})
    last = new.get_parameter("words.weight")[3].clone()
    report = load_weights(
        new,
        tmp_path / "old.safetensors",
        on_mismatch={"words.*": "overlap", "places.*": "interpolate"},
    )
    words = new.get_parameter("words.weight")
    assert torch.equal(words[:3], old.get_parameter("words.weight"))
    assert torch.equal(words[3], last)
    expected = torch.tensor([[0.0, 2], [0.5, 3], [1, 4], [1.5, 2], [2, 0]])
    assert torch.equal(new.get_parameter("places.weight"), expected)
    assert report.resized["words.weight"] == "overlap, shape 3x2, expected 4x2"
    assert report.loaded == ()


def test_prefixes_are_renamed(tmp_path: Path) -> None:
    """Names of a wrapper or of a part of another model match by their new prefixes."""
    of_other = {f"module.{name}": value for name, value in net().state_dict().items()}
    of_other["module.neck.weight"] = torch.ones(1)
    save_file(of_other, tmp_path / "ddp.safetensors")
    model = net()
    with pytest.raises(StateError, match=r"nothing .* matches .*write rename: {'module.': ''}"):
        load_weights(model, tmp_path / "ddp.safetensors")
    report = load_weights(model, tmp_path / "ddp.safetensors", rename={"module.": ""})
    assert torch.equal(values(model)["body.bias"], of_other["module.body.bias"])
    assert report.unused == ("neck.weight",)
    part = net().get_submodule("body")
    report = load_weights(part, tmp_path / "ddp.safetensors", rename={"module.body.": ""})
    assert torch.equal(values(part)["weight"], of_other["module.body.weight"])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"include": ["bodi.*"]}, r"include: 'bodi.\*' matches no name in the model; it has body"),
        ({"exclude": ["neck.*"]}, "exclude: 'neck.*' matches no name"),
        ({"on_mismatch": {"hed.*": "skip"}}, "on_mismatch: 'hed.*' matches no name"),
        ({"rename": {"model.": ""}}, "no name in .* begins with 'model.'; it has body.bias"),
        ({"rename": {"body.": "x.", "head.": "x."}}, "two entries of .* become 'x.bias'"),
        ({"exclude": ["*"]}, "nothing in .* matches"),
        ({"weights": "ema"}, "has weights only, none of a hook 'ema'"),
        ({"checkpoint": "best"}, "holds weights of one step"),
    ],
)
def test_rules_that_match_nothing_are_refused(
    file: Path, options: dict[str, Any], problem: str
) -> None:
    """A misspelled pattern or prefix is an error, and the model stays as it was."""
    model = net()
    before = values(model)
    with pytest.raises(ValueError, match=problem):
        load_weights(model, file, **options)
    assert_equal(values(model), before)


def test_other_kinds_of_numbers_are_refused(tmp_path: Path) -> None:
    """Floating-point types are converted; integers in place of floats are refused."""
    state = net().state_dict()
    half = {name: value.bfloat16() for name, value in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    model = net()
    load_weights(model, tmp_path / "half.safetensors")
    assert torch.equal(values(model)["body.weight"], half["body.weight"].float())
    save_file({**state, "body.bias": torch.ones(4, dtype=torch.int8)}, tmp_path / "int.safetensors")
    with pytest.raises(StateError, match=r"body.bias \(torch.int8, expected torch.float32\)"):
        load_weights(model, tmp_path / "int.safetensors")


def test_tied_entries_are_loaded_once(tmp_path: Path) -> None:
    """A file may lack one of the names of a tied parameter."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
            self.head.weight = self.words.weight

    weight = torch.rand(3, 2)
    save_file({"words.weight": weight}, tmp_path / "tied.safetensors")
    model = Tied()
    assert load_weights(model, tmp_path / "tied.safetensors").missing == ()
    assert torch.equal(model.head.weight, weight)
    assert model.head.weight is model.words.weight


def test_sharded_files_are_loaded_by_their_index(tmp_path: Path) -> None:
    """A folder of Transformers' shards is a source; a shard elsewhere is refused."""
    state = net().state_dict()
    files = {name: f"model-0000{1 + (name[0] == 'h')}-of-00002.safetensors" for name in state}
    for file in set(files.values()):
        save_file({n: v for n, v in state.items() if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for path in (tmp_path, index):
        model = net()
        report = load_weights(model, path)
        assert_equal(values(model), state)
    assert len(report.digests) == 2
    index.write_text(json.dumps({"weight_map": {**files, "neck.weight": files["body.bias"]}}))
    with pytest.raises(CheckpointError, match=r"lacks 'neck\.weight' of the index"):
        load_weights(net(), tmp_path)
    index.write_text(json.dumps({"weight_map": {"body.weight": "../net.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"files in its folder, found '\.\./net"):
        load_weights(net(), tmp_path)


def test_pickle_is_never_read(tmp_path: Path) -> None:
    """A file of another format is refused by its suffix, and by its content."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in ("net.pt", "net.bin", "net.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError):
            load_weights(net(), tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_malformed_file_is_refused(file: Path, tmp_path: Path) -> None:
    """Truncated and sparse files, and pipes, are errors with the path."""
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"net.safetensors: its tensors have"):
        load_weights(net(), file)
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + (1 << 30))
    with pytest.raises(CheckpointError, match="sparse"):
        load_weights(net(), file)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_weights(net(), tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="there is no"):
        load_weights(net(), tmp_path / "absent")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=f"name its folder, {tmp_path}$"):
        load_weights(net(), tmp_path / "config.yaml")


@pytest.fixture(scope="module")
def script_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HookBasedTrainer]:
    """The run folder of a script with a moving average, and its trainer."""
    folder = tmp_path_factory.mktemp("run")
    model = net()
    trainer = HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        [torch.randn(3, 2) for _ in range(4)],
        SimpleBatchProcessor.from_callable(lambda model, x: (None, model(x).square().mean())),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[EMAConfig(decay=0.5), SaveCheckpointConfig(every="2 steps", keep_last=2)],
        max_epoch=1,
        run_folder=folder,
    )
    trainer()
    return folder, trainer


def test_weights_of_a_run_are_loaded(script_run: tuple[Path, HookBasedTrainer]) -> None:
    """A run folder gives its newest checkpoint; a checkpoint's path gives that checkpoint."""
    folder, trainer = script_run
    model = net()
    assert load_weights(model, folder).step == 4
    assert_equal(values(model), values(trainer.model))
    assert load_weights(model, folder / "checkpoints/step_00000002").step == 2
    assert not torch.equal(values(model)["head.bias"], values(trainer.model)["head.bias"])


def test_a_checkpoint_is_not_replaced_by_the_best_of_its_run(
    script_run: tuple[Path, HookBasedTrainer],
) -> None:
    """The path of one checkpoint with ``checkpoint="best"`` is an error, also through a link."""
    for name in ("step_00000002", "last"):
        with pytest.raises(ConfigError, match=f"{name}; name the run folder"):
            load_weights(net(), script_run[0] / "checkpoints" / name, checkpoint="best")


def test_a_weight_set_of_a_run_is_loaded(script_run: tuple[Path, HookBasedTrainer]) -> None:
    """The moving average of a hook is chosen by the hook's name."""
    folder, trainer = script_run
    (average,) = [hook for hook in trainer.hooks.all_hooks() if hook.name == "EMA"]
    model = net()
    report = load_weights(model, folder, weights="EMA")
    expected = average.weights()  # type: ignore[attr-defined]  # an EMA
    assert_equal(values(model), expected)
    assert "(EMA, step 4)" in str(report)
    with pytest.raises(CheckpointError, match="no weights of a hook 'ema'; did you mean 'EMA'"):
        load_weights(model, folder, weights="ema")


def test_requires_grad_stays(file: Path) -> None:
    """Frozen parameters get values and stay frozen."""
    model = net()
    model.get_submodule("body").requires_grad_(False)
    load_weights(model, file)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_weights_are_loaded_into_shards(tmp_path: Path) -> None:
    """A model that is sharded by FSDP2 gets its shards of complete values."""
    old = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    save_file(old.state_dict(), tmp_path / "old.safetensors")
    done = launch(SCRIPTS / "begin_on_ranks.py", tmp_path / "old.safetensors")
    assert done.stderr.count("weights from") == 1
