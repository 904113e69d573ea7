"""Numbers of samples: by dataset indices, by the batch processor, or by a batch's structure."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from count_on_ranks import (
    BATCH_SIZE,
    BATCHES,
    COLLATED,
    SAMPLES,
    SOURCES,
    WINDOW,
    Batch,
    Pair,
    evaluate,
    loss_of_batch,
    make_data,
    plain,
    sample,
    train,
)
from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline import PipelineHooks, SimpleBatchProcessor, batch_processor
from robo_orchard_lab.pipeline.batch_processor import count_samples
from tiny import make_model, make_trainer, weights

CASES = [(kind, source) for kind in COLLATED for source in SOURCES]
GUESSED = [("metadata", "list"), ("metadata", "stream")]
"""Data without indices whose batches begin with a matrix of the camera."""


@pytest.fixture(autouse=True)
def in_double_precision(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(batch_processor, "_reported", set())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images(*heights: int) -> list[torch.Tensor]:
    return [torch.zeros(3, height, 2) for height in heights]


def targets(*boxes: int) -> list[dict[str, Any]]:
    return [{"boxes": torch.zeros(n, 4), "id": n} for n in boxes]


X, Y = torch.zeros(5, 2), torch.zeros(5)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((X, Y), 5),
        ([X, Y], 5),
        ([X], 5),
        ({"x": X, "y": Y.numpy()}, 5),
        (([X, X], Y), 5),  # a list of inputs
        (Batch(X, X), 5),
        (Pair(["a"] * 5, X, Y), 5),
        ((["a", "b"], X[:2]), 2),
        (["a", "b", "c"], 3),
        (("a", "b", "c"), 3),
        ((images(4, 5), targets(1, 7)), 2),
        ((images(4), targets(7)), 1),
        ((tuple(images(4, 5, 6, 7)), tuple(targets(1, 7, 2, 1))), 4),
        ([tuple(images(4, 5, 6, 7)), tuple(targets(1, 7, 2, 1))], 4),
        ({"images": images(4, 5), "targets": targets(0, 7)}, 2),
        ((images(4, 5), [1, 0]), 2),
        (Batch(images(4, 5), targets(0, 7)), 2),  # type: ignore[arg-type]
        (targets(1, 2), 2),
        ([Batch(X, Y), Batch(X[:2], Y[:2])], 2),
        ([torch.zeros(100, 3), torch.zeros(80, 3)], 2),
    ],
)
def test_consistent_structure_is_counted(
    batch: Any, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Structures with one consistent reading are counted without a warning."""
    assert count_samples(batch) == count
    assert not caplog.text


@pytest.mark.parametrize(
    ("batch", "count", "message"),
    [
        ((images(4, 5), targets(3, 3)), 2, r"tuple\(list\(Tensor\), list\(dict\(boxes: Tensor"),
        ({"camera": torch.eye(3), "x": X}, 3, r"dict\(camera: Tensor, x: Tensor\) has tensors"),
        ([X, X], 5, r"list\(Tensor\) has tensors and lists of different lengths"),
        ([(torch.zeros(3, 4, 4), 1)] * 2, 2, r"list\(tuple\(Tensor, int\)\) .* is a guess"),
        ("text", 1, "type str has no tensor to count its samples by; it counts as 1"),
    ],
)
def test_guess_is_reported_once(
    batch: Any, count: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ambiguous structures are described in one warning, with the method to define."""
    assert [count_samples(batch), count_samples(batch)] == [count, count]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(
        "accumulation windows and samples per second use the number"
    )
    assert "Define count_samples(batch) on the batch processor" in record.getMessage()
    assert re.search(message, record.getMessage())


def sizes_of(source: str, rank: int, processes: int) -> list[int]:
    """The numbers of samples of a rank's steps."""
    if source == "loader":
        steps = range(0, SAMPLES, BATCH_SIZE * processes)
        in_steps = [torch.arange(SAMPLES)[i : i + BATCH_SIZE * processes] for i in steps]
        return [len(torch.tensor_split(step, processes)[rank]) for step in in_steps]
    sizes = [len(batch) for batch in BATCHES[rank::processes]]
    return sizes + [0] * (-(-len(BATCHES) // processes) - len(sizes))


@pytest.mark.parametrize(("kind", "source"), CASES)
def test_batches_are_counted(kind: str, source: str, caplog: pytest.LogCaptureFixture) -> None:
    """Windows, batch_size and means of losses count samples, whatever a batch looks like."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=WINDOW)
    found = train(accelerator, kind, source)
    value = evaluate(accelerator, kind, source)
    if (kind, source) in GUESSED:
        assert caplog.text.count("is a guess; it counts as 3") == 1
        return
    assert not caplog.text
    assert found["sizes"] == sizes_of(source, 0, 1)
    for ours, theirs in zip(found["weights"], plain(source, 1), strict=True):
        torch.testing.assert_close(ours, theirs)
    every = [str(i) for i in range(SAMPLES)]
    assert value == pytest.approx(loss_of_batch(make_model(), every)[1].item())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(SCRIPTS / "count_on_ranks.py", folder, processes=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("kind", "source"), [case for case in CASES if case not in GUESSED])
def test_batches_are_counted_on_ranks(
    kind: str, source: str, ranks: list[dict[tuple[str, str], Any]]
) -> None:
    """On two ranks with accumulation, an update is that of all samples of the window."""
    every = [str(i) for i in range(SAMPLES)]
    loss = loss_of_batch(make_model(), every)[1].item()
    for rank, results in enumerate(ranks):
        found = results[kind, source]
        assert found["sizes"] == sizes_of(source, rank, 2)
        for ours, theirs in zip(found["weights"], plain(source, 2), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert found["val/loss"] == pytest.approx(loss)


class Complete(torch.utils.data.Dataset[Any]):
    """Dataset whose items are batches of 1, 2, 3 and 4 samples."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        samples = [sample(i) for i in range(index + 1)]
        return tuple(map(torch.stack, zip(*samples, strict=True)))


def test_complete_batches_of_a_dataset_count_their_samples() -> None:
    """With batch_size=None an index stands for a batch; windows count the batch's samples."""
    model, reference = make_model(), make_model()
    loader = DataLoader(Complete(), batch_size=None)
    make_trainer(model=model, loader=loader, accumulate=4, max_epoch=1)()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    joined = tuple(map(torch.cat, zip(*loader, strict=True)))
    (reference(joined[0]) - joined[1]).square().mean().backward()
    optimizer.step()
    for ours, theirs in zip(weights(model), weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs)


class CountsTwo(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Any) -> Any:
        return loss_of_batch(model, batch)

    def count_samples(self, batch: Any) -> int:
        return 2


@pytest.mark.parametrize("source", SOURCES)
def test_processor_counts_before_indices(source: str) -> None:
    """A processor's count_samples has priority, also in the numbers of a stream's samples."""
    seen = []
    hooks = PipelineHooks()
    hooks.on_step.after(lambda args: seen.append((args.batch_size, args.sample_numbers)))
    data = make_data("detection", source)
    make_trainer(hooks, loader=data, batch_processor=CountsTwo(), max_step=2)()
    assert [size for size, _ in seen] == [2, 2]
    if source in ("list", "stream"):
        assert [list(numbers) for _, numbers in seen] == [[0, 1], [2, 3]]
