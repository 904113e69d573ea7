"""Saving to a store and loading from it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    FiniteCheck,
    ReadLimits,
    Retention,
    load_checkpoint,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.errors import (
    CheckpointError,
    PipelineConfigError,
    StateError,
    StoreLockedError,
)
from state_trees import same, states


def parts(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"layer.weight": torch.full((3, 4), value), "layer.bias": torch.zeros(3)},
        "optimizer": {"state": {"layer.weight": {"step": torch.tensor(value)}}, "lr": 0.1},
        "trainer": {"step": int(value), "name": "run"},
    }


def test_load_returns_the_saved_state(tmp_path: Path) -> None:
    """Parts of the job and of the rank, and the manifest's info, are restored."""
    with CheckpointStore(tmp_path / "run") as store:
        saved = store.save(
            7,
            parts(),
            {"random": {"torch": torch.get_rng_state()}},
            metrics={"loss": float("inf")},
            metadata={"git": None, "versions": {"torch": torch.__version__ + ""}},
        )
        found = store.load("last")
    assert same(dict(found.parts), parts())
    assert same(dict(found.rank_parts), {"random": {"torch": torch.get_rng_state()}})
    assert found.info == saved
    assert (saved.step, saved.serial, saved.ranks, saved.digest) == (7, 1, 1, "xxh3_128")
    assert saved.metrics == {"loss": float("inf")}
    assert saved.path == tmp_path / "run" / "step_00000007"
    assert saved.size_bytes == sum(
        file.stat().st_size for file in saved.path.iterdir() if file.name != "manifest.json"
    )


@given(states)
@settings(max_examples=40)
def test_any_state_tree_round_trips(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    """A generated tree that is saved as a part is loaded unchanged."""
    folder = tmp_path_factory.mktemp("tree") / "one"
    save_checkpoint(folder, 0, {"part": state}, {"part": [state]})
    found = load_checkpoint(folder)
    assert same(found.parts["part"], state)
    assert same(found.rank_parts["part"], [state])


def test_any_tensor_round_trips(tmp_path: Path) -> None:
    """Dtypes, views, strides, empty and scalar tensors and tied weights are restored bit for
    bit."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "expanded": torch.ones(1, 3).expand(2, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "single": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "tied_a": base,
        "tied_b": base,
        "needs_grad": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "bool": torch.tensor([True, False, True]),
        **{
            str(dtype): torch.tensor([0, 1, 2]).to(dtype)
            for dtype in (
                *(torch.float64, torch.float16, torch.bfloat16, torch.complex64),
                *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32),
                *(torch.int64, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
            )
        },
    }
    save_checkpoint(tmp_path / "one", 0, {"flat": tensors, "tree": [tensors]})
    found = load_checkpoint(tmp_path / "one").parts
    for loaded in (found["flat"], found["tree"][0], load_file(tmp_path / "one/flat.safetensors")):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert not loaded[name].requires_grad
            assert torch.equal(
                loaded[name].reshape(-1).view(torch.uint8),
                tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8),
            )
    assert list(found["flat"]) == list(tensors)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.complex128), "'w' can't be saved: its dtype is .*complex128"),
        (torch.eye(2).to_sparse(), "'w' can't be saved: its layout is torch.sparse_coo"),
        (torch.empty(2, device="meta"), "'w' can't be saved: it is a meta tensor"),
    ],
)
def test_unsupported_tensor_is_refused_by_name(
    tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    """A tensor that safetensors can't hold is an error that names it; nothing is written."""
    with CheckpointStore(tmp_path) as store, pytest.raises(StateError, match=message):
        store.save(1, {"model": {"w": tensor}})
    assert os.listdir(tmp_path) == [".lock"]


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("model", {"a": object()}, "the part 'model': a can't be saved: .* found object"),
        ("model", endless(), "the part 'model' is nested deeper than 100"),
        ("model", [10**5000], "the part 'model': Exceeds the limit"),
        ("../model", 1, "a part can't be named '../model'"),
        ("manifest", 1, "a part can't be named 'manifest'"),
        ("Model", 1, "a part can't be named 'Model'"),
    ],
)
def test_unsupported_value_is_refused_by_name(
    part: str, value: Any, message: str, tmp_path: Path
) -> None:
    """A value that can't be saved, or could not be loaded again, is an error that names its
    part."""
    with pytest.raises(StateError, match=message):
        save_checkpoint(tmp_path / "one", 1, {part: value})
    assert os.listdir(tmp_path) == []


def test_invalid_step_metric_or_metadata_is_refused(tmp_path: Path) -> None:
    """Step, metrics and metadata are checked before anything is written."""
    with pytest.raises(StateError, match="step must be an integer >= 0, got -1"):
        save_checkpoint(tmp_path / "one", -1, {})
    with pytest.raises(StateError, match="the metric 'loss' must be a number, got 'low'"):
        save_checkpoint(tmp_path / "one", 1, {}, metrics={"loss": "low"})  # type: ignore[dict-item]
    with pytest.raises(StateError, match="the metadata can't be saved: w is a tensor"):
        save_checkpoint(tmp_path / "one", 1, {}, metadata={"w": torch.ones(1)})
    with pytest.raises(StateError, match="the metadata can't be saved: nested deeper"):
        save_checkpoint(tmp_path / "one", 1, {}, metadata=deep())
    assert os.listdir(tmp_path) == []


def deep() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(300):
        found = {"in": found}
    return found


def test_weights_load_with_safetensors_alone(tmp_path: Path) -> None:
    """The model's part is a safetensors file that loads into a plain model."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    save_checkpoint(tmp_path / "deep" / "one", 3, {"model": model.state_dict()})
    assert sorted(os.listdir(tmp_path / "deep" / "one")) == ["manifest.json", "model.safetensors"]
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    other.load_state_dict(load_file(tmp_path / "deep" / "one" / "model.safetensors"))
    assert same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("digest", ["xxh3_128", "sha256"])
def test_pending_save_is_a_copy(digest: Any, tmp_path: Path) -> None:
    """Changes between prepare and commit are not in the checkpoint."""
    state = parts(1.0)
    with CheckpointStore(tmp_path, digest=digest) as store:
        for step in (1, 2):  # the second one into the memory of the first
            with torch.no_grad():
                state["model"]["layer.weight"].fill_(step)
            pending = store.prepare(step, state)
            state["model"]["layer.weight"].fill_(99)
            thread = threading.Thread(target=pending.commit)
            thread.start()
            thread.join()
            assert store.load(step).parts["model"]["layer.weight"].eq(step).all()
            assert store.load(step).info.digest == digest
        store.prepare(3, state).discard()
        with pytest.raises(CheckpointError, match="committed or discarded already"):
            pending.commit()
    assert [info.step for info in store.list()] == [1, 2]


def test_pending_save_of_a_large_state_is_a_copy(tmp_path: Path) -> None:
    """Tensors that several threads copy are complete when prepare returns."""
    state = {f"{n}": torch.full((1024, 257), float(n)) for n in range(70)}  # 1 MiB each
    state |= {f"small{n}": torch.tensor(float(n)) for n in range(300)}
    state["transposed"] = torch.arange(2.0 * 2**20).view(1024, 2048).T
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else torch's own threads copy
    try:
        with CheckpointStore(tmp_path) as store:
            for step in (1, 2):
                for tensor in state.values():
                    tensor.add_(step)
                expected = {name: tensor.clone() for name, tensor in state.items()}
                pending = store.prepare(step, {"model": state})
                for tensor in state.values():
                    tensor.zero_()
                pending.commit()
                assert same(dict(store.load(step).parts["model"]), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no batch policy")
def test_commit_in_a_thread_does_not_interrupt_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread has the batch policy during a commit only; the main thread never has."""
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        pytest.skip("the tests run with a policy of their own")
    policies: list[int] = []

    def record(_: logging.LogRecord) -> bool:
        policies.append(os.sched_getscheduler(0))
        return True

    def commit() -> None:
        pending.commit()  # warns of the state that is not finite
        policies.append(os.sched_getscheduler(0))

    caplog.handler.addFilter(record)
    finite = FiniteCheck(covers=lambda name: True, non_finite=["hook/state"])
    with CheckpointStore(tmp_path) as store:
        pending = store.prepare(1, parts(), finite=finite)
        thread = threading.Thread(target=commit)
        thread.start()
        thread.join()
        pending = store.prepare(2, parts(), finite=finite)
        commit()
    assert policies == [os.SCHED_BATCH, os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_OTHER]


def test_saving_a_step_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    """A step has one checkpoint, the newer one, which becomes the last."""
    with CheckpointStore(tmp_path) as store:
        store.save(1, parts(1))
        store.save(2, parts(2))
        store.save(1, parts(5))
        assert [(info.step, info.serial) for info in store.list()] == [(2, 2), (1, 3)]
        assert store.load("last").parts["trainer"]["step"] == 5
    assert os.readlink(tmp_path / "last") == "step_00000001"
    assert sorted(os.listdir(tmp_path)) == [".lock", "last", "step_00000001", "step_00000002"]


def test_serials_continue_after_reopening(tmp_path: Path) -> None:
    """A resumed run continues from the highest serial at any step."""
    with CheckpointStore(tmp_path) as store:
        store.save(5, parts())
        store.save(3, parts())
    with CheckpointStore(tmp_path) as store:
        assert store.save(4, parts()).serial == 3
    newest = CheckpointStore(tmp_path).load_newest()
    assert newest is not None
    assert newest.info.step == 4


def test_best_follows_the_metric(tmp_path: Path) -> None:
    """The link and load("best") follow the metric; a store without a metric follows the link."""
    retention = Retention(monitor="acc", mode="max")
    with CheckpointStore(tmp_path, retention=retention) as store:
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* has the metric 'acc'"):
            store.load("best")
        for step, value in enumerate((0.5, 0.75, float("nan"), 0.75, 0.25)):
            store.save(step, parts(), metrics={"acc": value})
        store.save(9, parts())
        assert store.load("best").info.step == 1
    assert os.readlink(tmp_path / "best") == "step_00000001"
    assert CheckpointStore(tmp_path).load("best").info.step == 1
    (tmp_path / "best").unlink()
    with pytest.raises(CheckpointError, match="has no link to the best checkpoint"):
        CheckpointStore(tmp_path).load("best")


def test_load_accepts_a_path_or_a_link(tmp_path: Path) -> None:
    """A path may be any directory, or a link to one."""
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, parts())
        assert store.load(tmp_path / "run" / "last").info.step == 1
        assert load_checkpoint(tmp_path / "run" / "last").info.step == 1
        os.rename(tmp_path / "run" / "step_00000001", tmp_path / "moved")
        assert store.load(str(tmp_path / "moved")).info.step == 1


def test_missing_checkpoint_is_an_error_without_fallback(tmp_path: Path) -> None:
    """No other checkpoint replaces a missing one."""
    store = CheckpointStore(tmp_path / "run")
    assert store.load_newest() is None
    assert store.list() == []
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        store.load("last")
    with store:
        store.save(1, parts())
    with pytest.raises(CheckpointError, match="has no step 2; it has: 1"):
        store.load(2)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*elsewhere"):
        store.load(tmp_path / "elsewhere")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(CheckpointError, match=r"circle leads nowhere"):
        store.load(tmp_path / "circle")


def test_closed_store_does_not_write(tmp_path: Path) -> None:
    """Saving requires an open store, and opening twice is an error."""
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="is not open; write `with"):
        store.save(1, parts())
    with store:
        with pytest.raises(CheckpointError, match="is open already"):
            store.open()
        pending = store.prepare(1, parts())
    with pytest.raises(CheckpointError, match="is not open"):
        pending.commit()
    assert os.listdir(tmp_path) == [".lock"]


def test_root_must_be_a_directory(tmp_path: Path) -> None:
    """A file as root is a CheckpointError."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"opening .*file failed: not a directory"):
        CheckpointStore(tmp_path / "file").open()


def test_invalid_arguments_are_refused() -> None:
    """Arguments are checked at construction."""
    with pytest.raises(PipelineConfigError, match=r"digest must be one of .*, got 'md5'"):
        CheckpointStore("nowhere", digest="md5")  # type: ignore[arg-type]
    with pytest.raises(PipelineConfigError, match="keep_last must be >= 1, got 0"):
        Retention(keep_last=0)
    with pytest.raises(PipelineConfigError, match="name it as monitor"):
        Retention(keep_best=1)
    with pytest.raises(PipelineConfigError, match="max_files must be >= 1, got 0"):
        ReadLimits(max_files=0)


def test_save_checkpoint_never_overwrites(tmp_path: Path) -> None:
    """An existing path, even a dangling link, is unchanged."""
    (tmp_path / "one").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="exists already"):
        save_checkpoint(tmp_path / "one", 1, parts())
    assert os.listdir(tmp_path) == ["one"]


def test_second_store_in_the_process_is_refused(tmp_path: Path) -> None:
    """Another path to the root does not evade the lock; readers need no lock."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, parts())
        with pytest.raises(StoreLockedError, match=f"by process {os.getpid()} on "):
            CheckpointStore(tmp_path / "link").open()
        assert CheckpointStore(tmp_path / "link").load("last").info.step == 1
    CheckpointStore(tmp_path / "link").open().close()


HOLD = """
import sys
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1]).open()
print("open", flush=True)
sys.stdin.read()
"""


def test_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    """The message names the process with the lock; a killed process loses the lock."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "open\n"
    with pytest.raises(StoreLockedError, match=f"by process {first.pid} on .*, since 2"):
        CheckpointStore(tmp_path).open()
    first.kill()
    first.communicate()
    CheckpointStore(tmp_path).open().close()


def test_manifest_is_readable_json(tmp_path: Path) -> None:
    """The manifest is JSON that lists the files."""
    save_checkpoint(tmp_path / "one", 3, parts(), {"random": [1]})
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["format"] == "robo_orchard_lab.checkpoint"
    assert (manifest["version"], manifest["step"], manifest["ranks"]) == (1, 3, 1)
    assert sorted(manifest["files"]) == [
        *("model.safetensors", "optimizer.json", "optimizer.safetensors"),
        *("random.rank00000.json", "trainer.json"),
    ]


def test_loaded_tensor_has_its_own_storage(tmp_path: Path) -> None:
    """A generator reads a complete storage, and torch.save writes it."""
    generator = torch.Generator().manual_seed(3)
    state = {"other": torch.ones(100), "stream": generator.get_state(), "after": torch.ones(3)}
    save_checkpoint(tmp_path / "one", 1, {"part": state})
    found = load_checkpoint(tmp_path / "one").parts["part"]
    loaded = torch.Generator()
    loaded.set_state(found["stream"])
    assert torch.equal(torch.rand(3, generator=loaded), torch.rand(3, generator=generator))
    assert found["other"].untyped_storage().nbytes() == 400
