"""Evaluation counts each sample once and changes nothing else."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from evaluate_on_ranks import (
    SIZES,
    Classify,
    Rows,
    Stream,
    expected_values,
    make_evaluation_loader,
    make_metrics,
    make_normalised,
    run_on_ranks,
)
from robo_orchard_lab.pipeline import SimpleBatchProcessor
from robo_orchard_lab.pipeline.data.evaluation_loader import EvaluationLoader
from robo_orchard_lab.pipeline.errors import BatchProcessorError, DataError, PipelineConfigError
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.metrics import MetricValueError
from robo_orchard_lab.pipeline.metrics.torchmetrics import MetricArguments
from tiny import equal, loss_of, make_loader, make_model

KINDS = ("plain", "shuffled", "stream", "list", "unbatched")

# AUROC and the correlation of a single sample are undefined, and warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:No positive samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:No negative samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:The variance of predictions:UserWarning"),
]


def make_evaluator(loader: Any, model: torch.nn.Module | None = None, **options: Any) -> Evaluator:
    model = make_model() if model is None else model
    return Evaluator(model, options.pop("processor", Classify()), {"val": loader}, **options)


def assert_close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) == {f"val/{name}" for name in expected}
    for name, value in expected.items():
        assert found[f"val/{name}"] == pytest.approx(value, rel=1e-5, nan_ok=True), name


@pytest.mark.parametrize(
    ("size", "shuffle", "workers"),
    [*((size, shuffle, 0) for size in SIZES for shuffle in (False, True)), (65, True, 2)],
)
def test_values_equal_the_complete_set(size: int, shuffle: bool, workers: int) -> None:
    """Loss and metrics equal torch's and torchmetrics' of all rows for any last batch."""
    loader = make_evaluation_loader(size, shuffle=shuffle, num_workers=workers)
    model, processor = make_model(), Classify()
    evaluator = make_evaluator(loader, model, processor=processor, metrics=make_metrics())
    assert_close(evaluator.evaluate(), expected_values(make_model(), size))
    assert sorted(processor.seen) == list(range(size))
    assert_close(evaluator.evaluate(), expected_values(make_model(), size))  # and once more


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of two processes."""
    return run_on_ranks(tmp_path_factory.mktemp("ranks"), "by_size", "with_buffers", "refused")


class TestOnTwoRanks:
    """Two processes divide the batches, and both know all values."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", SIZES)
    def test_each_sample_counts_once(
        self, ranks: list[dict[str, Any]], size: int, kind: str
    ) -> None:
        """Every kind of loader is evaluated without repeats, also if a rank has no batch."""
        first, second = (rank["by_size"][f"{size} {kind}"] for rank in ranks)
        assert sorted(first["seen"] + second["seen"]) == list(range(size))
        assert len(second["seen"]) == sum(
            len(range(i, min(i + 8, size))) for i in range(8, size, 16)
        )
        assert_close(first["values"], expected_values(make_model(), size))
        assert str(first["values"]) == str(second["values"])

    def test_one_collective_per_evaluation(self, ranks: list[dict[str, Any]]) -> None:
        """An evaluation with four metrics needs one collective."""
        for rank in ranks:
            for found in rank["by_size"].values():
                assert found["calls"] == ["all_gather"]

    @pytest.mark.parametrize("broadcast", [True, False])
    def test_buffers_of_the_first_rank_are_used(
        self, ranks: list[dict[str, Any]], broadcast: bool
    ) -> None:
        """Both ranks evaluate with its buffers, sent in one broadcast, and restore their own."""
        first, second = (rank["with_buffers"][f"broadcast_buffers={broadcast}"] for rank in ranks)
        assert first["alone"] != second["alone"]
        for rank in (first, second):
            assert rank["values"]["val/loss"] == pytest.approx(first["alone"], rel=1e-5)
            assert rank["calls"] == ["broadcast", "all_gather"]
            assert rank["restored"]

    def test_divided_loaders_are_refused(self, ranks: list[dict[str, Any]]) -> None:
        """A prepared loader and a DistributedSampler would repeat samples."""
        for rank in ranks:
            errors = rank["refused"]
            assert (
                "PipelineConfigError: Evaluator: dataloaders['val'] was prepared"
                in (errors["prepared"])
            )
            assert "give the plain DataLoader" in errors["prepared"]
            assert "has a DistributedSampler" in errors["sampler"]

    def test_empty_stream_is_refused_on_both_ranks(self, ranks: list[dict[str, Any]]) -> None:
        """Data without a length is found to be empty after the pass, on every rank."""
        for rank in ranks:
            assert (
                "DataError: Evaluator: the evaluation loader dataloaders['val'] gave no"
                in (rank["refused"]["empty"])
            )


class StateSnapshot:
    """RNG states, module modes and buffers."""

    def __init__(self, model: torch.nn.Module, *generators: torch.Generator) -> None:
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.buffers = [buffer.clone() for buffer in model.buffers()]
        self.random = [torch.get_rng_state(), *(g.get_state() for g in generators)]
        self.others = (str(np.random.get_state(legacy=True)), random.getstate())

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, StateSnapshot)
        return (
            self.modes == other.modes
            and self.others == other.others
            and equal(self.buffers, other.buffers)
            and equal(self.random, other.random)
        )


class Augmented(Rows):
    """Dataset that draws from all RNGs and from a generator it holds."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.kept = np.random.default_rng(3)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        row["inputs"] = row["inputs"] + torch.rand(4) + float(np.random.rand()) + random.random()
        row["inputs"] += self.kept.random()
        return row


def test_evaluation_restores_all_state() -> None:
    """RNGs, generators of loader and data, buffers and modes are restored."""
    model = make_normalised()
    model[1].eval()  # type: ignore[index]  # a Sequential; a part that is frozen
    own, nested = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    data = Augmented(20)
    evaluator = Evaluator(
        model,
        Classify(),
        {
            "own": DataLoader(data, batch_size=8, shuffle=True, generator=own),
            "nested": DataLoader(
                data, batch_sampler=BatchSampler(RandomSampler(data, generator=nested), 8, False)
            ),
        },
        metrics=make_metrics(),
    )
    before, kept = StateSnapshot(model, own, nested), str(data.kept.bit_generator.state)
    first = evaluator.evaluate()
    assert StateSnapshot(model, own, nested) == before
    assert str(data.kept.bit_generator.state) == kept
    assert torch.is_grad_enabled()

    torch.rand(3)
    own.manual_seed(5)
    assert evaluator.evaluate() == first  # random values follow the seed
    assert (
        Evaluator(model, Classify(), {"own": DataLoader(data, 8, shuffle=True)}, seed=1).evaluate()[
            "own/loss"
        ]
        != (first["own/loss"])
    )


def test_state_is_restored_after_an_error() -> None:
    """Modes and RNGs are restored if the processor fails, and the next evaluation is complete."""
    model, processor = make_normalised(), Classify()
    model[2].eval()  # type: ignore[index]  # a Sequential
    evaluator = make_evaluator(
        DataLoader(Augmented(20), 8), model, processor=processor, metrics=make_metrics()
    )
    complete = evaluator.evaluate()
    before = StateSnapshot(model)
    forward = processor.forward

    def failing(model: Any, batch: Any) -> Any:
        if len(batch["id"]) < 8:
            raise RuntimeError("the last batch")
        return forward(model, batch)

    processor.forward = failing  # type: ignore[method-assign]  # to fail in the last batch
    with pytest.raises(RuntimeError, match="the last batch"):
        evaluator.evaluate()
    assert StateSnapshot(model) == before
    processor.forward = forward  # type: ignore[method-assign]  # as it was
    assert evaluator.evaluate() == complete


class Merging(torch.nn.Linear):
    """Layer that changes its weights with its mode, as some adapters do."""

    def train(self, mode: bool = True) -> Merging:
        if mode != self.training:
            with torch.no_grad():
                self.weight.mul_(0.5 if mode else 2.0)
        super().train(mode)
        return self


def test_overridden_train_is_called_for_both_modes() -> None:
    """The layer is evaluated with its evaluation weights and trained with its training weights."""
    model = torch.nn.Sequential(Merging(4, 4), torch.nn.ModuleList([Merging(4, 2)])[0])
    model[1].eval()
    before = [parameter.clone() for parameter in model.parameters()]
    seen: list[torch.Tensor] = []

    def forward(model: Any, batch: Any) -> Any:
        seen.append(model[0].weight.clone())
        return loss_of(model, batch)

    Evaluator(model, SimpleBatchProcessor.from_callable(forward), {"val": make_loader()}).evaluate()
    torch.testing.assert_close(seen[0], before[0] * 2)
    assert equal([parameter.clone() for parameter in model.parameters()], before)
    assert [module.training for module in model] == [True, False]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("compiled", [False, True])
def test_ddp_forward_is_not_called(compiled: bool) -> None:
    """Its forward, which communicates, is bypassed; modes and buffers are restored."""
    plain = make_normalised()
    ddp = DistributedDataParallel(plain)
    called: list[Any] = []
    ddp.register_forward_pre_hook(lambda module, args: called.append(args))
    model: Any = torch.compile(ddp, backend="eager") if compiled else ddp
    before = StateSnapshot(ddp)
    evaluator = make_evaluator(make_evaluation_loader(20), model, metrics=make_metrics())
    assert_close(evaluator.evaluate(), expected_values(make_normalised(), 20))
    assert called == []
    assert StateSnapshot(ddp) == before


def test_compiled_model_is_in_evaluation_mode() -> None:
    """The mode reaches the inner module and is restored there."""
    plain = make_normalised()
    compiled = torch.compile(plain, backend="eager")
    evaluator = make_evaluator(make_evaluation_loader(20), compiled)  # type: ignore[arg-type]  # a module
    assert_close(evaluator.evaluate(), {"loss": expected_values(make_normalised(), 20)["loss"]})
    assert all(module.training for module in plain.modules())


def test_order_is_independent_of_workers() -> None:
    """A shuffled loader yields equal batches with and without workers, each time."""
    orders = []
    for workers in (0, 2):
        processor = Classify()
        evaluator = make_evaluator(
            make_evaluation_loader(
                30, shuffle=True, num_workers=workers, persistent_workers=workers > 0
            ),
            processor=processor,
        )
        evaluator.evaluate()
        evaluator.evaluate()
        orders.append(processor.seen)
    assert orders[0] == orders[1]
    assert orders[0][:30] == orders[0][30:] != sorted(orders[0][:30])


def test_random_numbers_belong_to_the_batch() -> None:
    """Augmentation and a noisy forward are equal at any world size."""

    def drawn(loader: Any, rank: int, processes: int) -> list[tuple[float, float]]:
        loader = EvaluationLoader("val", loader, rank, processes, "test")
        return [(float(batch["inputs"].sum()), random.random()) for batch, _ in loader.batches(0)]

    for loader in (DataLoader(Augmented(30), 8, shuffle=True), list(make_evaluation_loader(30))):
        alone = drawn(loader, 0, 1)
        assert len(set(alone)) == 4
        assert drawn(loader, 0, 2) == alone[::2]
        assert drawn(loader, 1, 2) == alone[1::2]


def test_persistent_workers_are_reproducible() -> None:
    """An evaluation starts workers of its own, so augmentation is equal each time."""
    loader = DataLoader(Augmented(20), 8, num_workers=1, persistent_workers=True)
    evaluation = EvaluationLoader("val", loader, 0, 1, "test")
    sums = [[float(b["inputs"].sum()) for b, _ in evaluation.batches(0)] for _ in range(2)]
    assert sums[0] == sums[1]


def test_loader_in_use_is_not_disturbed() -> None:
    """The training loader may be evaluated within its epoch."""
    loader = make_evaluation_loader(40, num_workers=1, persistent_workers=True)
    seen = []
    for step, batch in enumerate(loader):
        seen += batch["id"].tolist()
        if step == 1:
            make_evaluator(loader).evaluate()
    assert seen == list(range(40))


def test_batches_without_a_loss_do_not_count() -> None:
    """The mean has the batches with a loss only, or no value."""

    def forward(model: Any, batch: Any) -> Any:
        return model(batch["inputs"]), None

    assert make_evaluator(
        make_evaluation_loader(9),
        processor=SimpleBatchProcessor.from_callable(forward, need_backward=False),
        metrics={"accuracy": MulticlassAccuracy(2)},
        metric_inputs=lambda outputs, batch: (outputs, batch["target"]),
    ).evaluate().keys() == {"val/accuracy"}

    def last_only(model: Any, batch: Any) -> Any:
        return None, torch.tensor(3.0) if len(batch["id"]) == 1 else None

    evaluator = make_evaluator(
        make_evaluation_loader(9), processor=SimpleBatchProcessor.from_callable(last_only)
    )
    assert evaluator.evaluate() == {"val/loss": 3.0}


def test_count_samples_of_the_processor_is_used() -> None:
    """A loss is weighted by count_samples, as in accumulation windows."""

    class Counting(Classify):
        def forward(self, model: Any, batch: Any) -> Any:
            return None, batch["id"].double().mean()

        def count_samples(self, batch: Any) -> int:
            return int(batch["id"][0]) + 1

    values = make_evaluator(make_evaluation_loader(16), processor=Counting()).evaluate()
    assert values == {"val/loss": pytest.approx((1 * 3.5 + 9 * 11.5) / 10)}


def test_pairs_need_no_metric_inputs() -> None:
    """Metrics of (inputs, targets) batches get outputs and targets."""
    batches = [(torch.eye(3), torch.tensor([0, 1, 0]))]

    def forward(model: Any, batch: Any) -> Any:
        return batch[0], None

    processor = SimpleBatchProcessor.from_callable(forward, need_backward=False)
    metrics = {"accuracy": MulticlassAccuracy(3, average="micro")}
    values = make_evaluator(batches, processor=processor, metrics=metrics).evaluate()
    assert values == {"val/accuracy": pytest.approx(2 / 3)}


def test_autocast_of_the_accelerator_is_used() -> None:
    """An unprepared model runs in the accelerator's precision, as a prepared one does."""
    seen = []

    def forward(model: Any, batch: Any) -> Any:
        seen.append(model(batch["inputs"]).dtype)
        return None, None

    processor = SimpleBatchProcessor.from_callable(forward, need_backward=False)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    loader = make_evaluation_loader(3)
    make_evaluator(loader, processor=processor, accelerator=accelerator).evaluate()
    prepared = accelerator.prepare(make_model())
    make_evaluator(loader, prepared, processor=processor, accelerator=accelerator).evaluate()
    make_evaluator(loader, processor=processor).evaluate()
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_drop_last_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Dropped samples are not evaluated."""
    with caplog.at_level(logging.WARNING):
        make_evaluator(make_evaluation_loader(9, drop_last=True))
    assert "dataloaders['val'] has drop_last=True" in caplog.text


@pytest.mark.parametrize(
    ("loaders", "error", "message"),
    [
        ({}, PipelineConfigError, r"dataloaders is empty"),
        ([1], PipelineConfigError, r"must be a mapping from names to loaders, got list; write"),
        ({"": [1]}, PipelineConfigError, r"names in dataloaders must be non-empty strings"),
        ({"val": 3}, PipelineConfigError, r"dataloaders\['val'\] must be an iterable .* got int"),
        ({"val": []}, DataError, r"Evaluator: the evaluation loader dataloaders\['val'\] gave no"),
        (
            {"val": make_evaluation_loader(7, drop_last=True)},
            DataError,
            r"leave out drop_last",
        ),
        (
            {"val": DataLoader(Rows(4), sampler=DistributedSampler(Rows(4), 2, 0))},
            PipelineConfigError,
            r"has a DistributedSampler, which repeats samples",
        ),
    ],
)
def test_loaders_are_checked_at_construction(
    loaders: Any, error: type[Exception], message: str
) -> None:
    """Invalid loaders are refused before anything runs, with the remedy."""
    with pytest.raises(error, match=message):
        Evaluator(make_model(), Classify(), loaders)


def test_loader_without_batches_is_refused_afterwards() -> None:
    """An empty stream, or an exhausted iterator, is an error after the pass."""
    with pytest.raises(DataError, match=r"dataloaders\['val'\] gave no batch"):
        make_evaluator(DataLoader(Stream(0), batch_size=4)).evaluate()
    once: Iterator[Any] = iter(list(make_evaluation_loader(3)))
    evaluator = make_evaluator(once)
    evaluator.evaluate()
    with pytest.raises(DataError, match="replace an iterator, which can be read only once"):
        evaluator.evaluate()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": {"loss": MulticlassAccuracy(2)}}, PipelineConfigError, "is named 'loss'"),
        ({"seed": -1}, PipelineConfigError, "seed must be an int >= 0, got -1"),
        ({"metric_inputs": 3}, PipelineConfigError, "metric_inputs must be callable as"),
        (
            {"metrics": {"confusion": MulticlassConfusionMatrix(2)}},
            MetricValueError,
            r"Evaluator: the metric 'confusion' computes a Tensor of shape \(2, 2\)",
        ),
    ],
)
def test_invalid_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Each error names the argument."""
    with pytest.raises(error, match=message):
        make_evaluator([1], **options)


@pytest.mark.parametrize(
    ("batch", "metric_inputs", "message"),
    [
        ({"x": 1}, None, r"expected a batch that is a pair .* found dict; define metric_inputs"),
        ((1, 2, 3), None, r"found tuple of length 3"),
        ((1, 2), lambda outputs, batch: 5, r"metric_inputs must return the arguments .* got int"),
    ],
)
def test_missing_metric_inputs_are_requested(batch: Any, metric_inputs: Any, message: str) -> None:
    """The error names what to define."""
    processor = SimpleBatchProcessor.from_callable(lambda model, batch: (None, None))
    evaluator = make_evaluator(
        [batch],
        processor=processor,
        metrics={"accuracy": MulticlassAccuracy(2)},
        metric_inputs=metric_inputs,
    )
    with pytest.raises(PipelineConfigError, match=message):
        evaluator.evaluate()


def test_metric_inputs_are_detached() -> None:
    """Metrics get tensors without a graph, within lists and mappings as well."""
    outputs = torch.ones(2, requires_grad=True) * 2

    def inputs(outputs: Any, batch: Any) -> Any:
        return [{"boxes": outputs}, (outputs, "name")], outputs

    args, kwargs = MetricArguments(inputs, None, "Hook")(outputs, None)
    (first, (second, name)), third = args
    assert [t.requires_grad for t in (first["boxes"], second, third)] == [False] * 3
    assert (name, kwargs) == ("name", {})


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (torch.zeros(2), "got Tensor"),
        ((1, 2.0), "got a loss that is a float"),
        ((1, torch.zeros(4)), r"got a loss that is a Tensor of shape \(4,\)"),
    ],
)
def test_invalid_processor_result_is_refused(result: Any, found: str) -> None:
    """The result must be a pair with a scalar loss or None."""
    processor = SimpleBatchProcessor.from_callable(lambda model, batch: result)
    with pytest.raises(BatchProcessorError, match=rf"must return \(outputs, loss\).*{found}"):
        make_evaluator([1], processor=processor).evaluate()


def test_non_finite_loss_is_reported() -> None:
    """NaN in one batch is NaN in the mean."""
    processor = SimpleBatchProcessor.from_callable(lambda model, batch: (None, batch))
    values = make_evaluator([torch.tensor(1.0), torch.tensor(math.nan)], processor=processor)
    assert math.isnan(values.evaluate()["val/loss"])
