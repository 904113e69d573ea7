"""Evaluations in one process, and in each of several under torchrun."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchmetrics import MeanSquaredError, Metric, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from launching import end_group, launch
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hook_set import HookLike, PipelineHooks
from robo_orchard_lab.pipeline.hooks.ema import EMAConfig
from robo_orchard_lab.pipeline.hooks.metric_tracker import MetricTrackerConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHookArgs
from robo_orchard_lab.pipeline.hooks.validation import ValidationHookConfig
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.trigger import EverySteps
from tiny import equal, make_model

SIZES = (1, 7, 64, 65)

Batch = dict[str, torch.Tensor]


class Rows(Dataset[Batch]):
    """Samples with an id; with ``noise``, drawn again at each reading."""

    def __init__(self, size: int, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(size, 4, generator=generator)
        self.target = (self.inputs[:, 0] + torch.randn(size, generator=generator) > 0).long()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        noise = self.noise * torch.randn(4) if self.noise else 0.0
        return {
            "id": torch.tensor(index),
            "inputs": self.inputs[index] + noise,
            "target": self.target[index],
        }


class Stream(IterableDataset[Batch]):
    """Iterable dataset of the same rows."""

    def __init__(self, size: int) -> None:
        self.rows = Rows(size)

    def __iter__(self) -> Iterator[Batch]:
        return (self.rows[index] for index in range(len(self.rows)))


class Classify(SimpleBatchProcessor):
    """Processor with cross entropy and metric inputs; records the samples it got."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += batch["id"].tolist()
        outputs = model(batch["inputs"])
        return outputs, torch.nn.functional.cross_entropy(outputs, batch["target"])

    def metric_inputs(self, outputs: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        score = outputs[:, 1] - outputs[:, 0]
        return {
            "preds": outputs.softmax(1),
            "target": batch["target"],
            "score": score,
            "truth": batch["target"].to(score.dtype),
        }


class SquaredError(MeanSquaredError):
    """Regression metric with summed states."""

    def update(self, score: torch.Tensor, truth: torch.Tensor) -> None:
        super().update(score, truth)


class Correlation(PearsonCorrCoef):
    """Metric that merges the ranks' states only when it is computed."""

    def update(self, score: torch.Tensor, truth: torch.Tensor) -> None:
        super().update(score, truth)


def make_metrics() -> dict[str, Metric]:
    """Return metrics with summed states, stacked ones, and AUROC, which keeps every sample."""
    return {
        "accuracy": MulticlassAccuracy(2, average="micro"),
        "auroc": MulticlassAUROC(2),
        "squared_error": SquaredError(),
        "correlation": Correlation(),
    }


def expected_values(model: torch.nn.Module, size: int) -> dict[str, float]:
    """Return torchmetrics' and torch's values of the complete set, in evaluation mode."""
    rows = Rows(size)
    batch = {"id": torch.arange(size), "inputs": rows.inputs, "target": rows.target}
    model.eval()
    with torch.no_grad():
        outputs, loss = Classify().forward(model, batch)
    model.train()
    found = {"loss": float(loss)}
    inputs = Classify().metric_inputs(outputs, batch)
    for name, metric in make_metrics().items():
        metric.sync_on_compute = metric._to_sync = False
        own = ("score", "truth") if isinstance(metric, (SquaredError, Correlation)) else ()
        metric.update(*(inputs[key] for key in own or ("preds", "target")))
        found[name] = float(metric.compute())
    return found


def make_evaluation_loader(size: int, **options: Any) -> DataLoader[Batch]:
    return DataLoader(Rows(size), batch_size=8, **options)


def make_normalised() -> torch.nn.Module:
    """Return a model with batch statistics and dropout."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2)
    )


class Counted(torch.nn.Module):
    """Layer that counts its passes, in a new tensor each."""

    passes: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes = self.passes + 1
        return inputs


def buffers_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


class CollectiveCounter:
    """Counter of the calls into torch.distributed."""

    names = ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "barrier")

    def __init__(self) -> None:
        self.calls: list[str] = []
        for name in self.names:
            setattr(torch.distributed, name, self._counted(name, getattr(torch.distributed, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return function(*args, **kwargs)

        return call

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


def by_size(accelerator: Accelerator, counter: CollectiveCounter) -> dict[str, Any]:
    """Return values, samples and collectives for each size and kind of loader."""
    found: dict[str, Any] = {}
    model = accelerator.prepare(make_model())
    for size in SIZES:
        loaders: dict[str, Any] = {
            "plain": make_evaluation_loader(size),
            "shuffled": make_evaluation_loader(size, shuffle=True),
            "stream": DataLoader(Stream(size), batch_size=8),
            "list": list(make_evaluation_loader(size)),
            "unbatched": DataLoader(
                Rows(size),
                batch_size=None,
                sampler=[torch.arange(i, min(i + 8, size)) for i in range(0, size, 8)],
            ),
        }
        for kind, loader in loaders.items():
            processor = Classify()
            evaluator = Evaluator(
                model, processor, {"val": loader}, metrics=make_metrics(), accelerator=accelerator
            )
            counter.take()
            values = evaluator.evaluate()
            found[f"{size} {kind}"] = {
                "values": values,
                "seen": processor.seen,
                "calls": counter.take(),
            }
    return found


def with_buffers(accelerator: Accelerator, counter: CollectiveCounter) -> dict[str, Any]:
    """Evaluate a model whose batch statistics differ between the ranks."""
    found: dict[str, Any] = {}
    for broadcast in (True, False):
        plain = torch.nn.Sequential(make_normalised(), Counted())
        model = DistributedDataParallel(plain, broadcast_buffers=broadcast)
        for _ in range(3):
            model(torch.randn(16, 4) + accelerator.process_index)
        before = buffers_of(plain)
        counter.take()
        values = Evaluator(
            model, Classify(), {"val": make_evaluation_loader(65)}, accelerator=accelerator
        ).evaluate()
        found[f"broadcast_buffers={broadcast}"] = {
            "values": values,
            "calls": counter.take(),
            "restored": all(map(torch.equal, before, buffers_of(plain))),
            "alone": expected_values(plain, 65)["loss"],
        }
    return found


def refused(accelerator: Accelerator, counter: CollectiveCounter) -> dict[str, Any]:
    """Return the errors of unsupported loaders."""
    dataset = Rows(9)
    loaders = {
        "prepared": accelerator.prepare(DataLoader(dataset, batch_size=2)),
        "sampler": DataLoader(dataset, sampler=DistributedSampler(dataset), batch_size=2),
        "empty": DataLoader(Stream(0), batch_size=2),
    }
    errors = {}
    for name, loader in loaders.items():
        try:
            Evaluator(make_model(), Classify(), {"val": loader}, accelerator=accelerator).evaluate()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def train(accelerator: Accelerator, hooks: list[HookLike], steps: int = 6) -> HookBasedTrainer:
    """Train with batch statistics, dropout and augmentation."""
    torch.manual_seed(8)
    model = make_normalised()
    trainer = HookBasedTrainer(
        accelerator,
        model,
        make_evaluation_loader(40, shuffle=True),
        Classify(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=hooks,
        max_step=steps,
    )
    torch.manual_seed(9)
    trainer()
    return trainer


def while_training(accelerator: Accelerator, counter: CollectiveCounter) -> dict[str, Any]:
    """Train with evaluations within accumulation windows, and without."""
    validation = ValidationHookConfig(every=EverySteps(1), at_start=True)(
        dataloaders={
            "small": DataLoader(Rows(3, noise=0.1), batch_size=8, shuffle=True),
            "large": DataLoader(Rows(65, noise=0.1), batch_size=8, shuffle=True),
        },
        metrics=make_metrics(),
    )
    ends = []
    runs: list[list[HookLike]] = [[], [validation]]
    for hooks in runs:
        trainer = train(Accelerator(cpu=True, gradient_accumulation_steps=3), hooks)
        state = trainer.model.state_dict()
        ends.append([*state.values(), torch.rand(2), torch.get_rng_state()])
    return {
        "same": all(map(torch.equal, *ends)),
        "values": {name: trainer.metrics.last_value(name) for name in trainer.metrics.names()},
    }


def tracked(accelerator: Accelerator, counter: CollectiveCounter) -> dict[str, Any]:
    """Return the published values of a tracker and their inputs."""
    batches: list[list[Any]] = []
    records: list[dict[int, dict[str, float]]] = []
    hooks = PipelineHooks("notes")

    @hooks.on_batch.after
    def note(args: PipelineHookArgs) -> None:
        assert isinstance(args.batch_processor, Classify)
        inputs = args.batch_processor.metric_inputs(args.model_outputs.detach(), args.batch)
        batches.append([inputs["preds"].tolist(), inputs["target"].tolist()])

    @hooks.on_step.after(when="2 steps")
    def log(args: PipelineHookArgs) -> None:
        args.requests.log("every 2 steps")

    def listen(record: MetricsRecord) -> None:
        records.append(record.by_step())

    hooks.register_hook(
        "on_loop", HookContext.from_callable(before=lambda args: args.metrics.listen(listen))
    )
    metrics = {"accuracy": MulticlassAccuracy(2, average="micro"), "auroc": MulticlassAUROC(2)}
    tracker = MetricTrackerConfig()(metrics=metrics)
    train(accelerator, [hooks, tracker])
    return {"batches": batches, "records": records}


class Measure(Classify):
    """Processor with an evaluation step that returns named values."""

    def forward(self, model: Any, batch: Batch) -> Any:
        raise AssertionError("evaluations use evaluation_forward")

    def evaluation_forward(self, model: Any, batch: Batch) -> Any:
        outputs, loss = super().forward(model, batch)
        is_odd = batch["id"] % 2 == 1
        values = {
            "loss": loss,
            "l1": (outputs[:, 0] - batch["target"]).abs().mean(),
            "first_id": float(batch["id"][0]),
            # Only some batches have a value.
            "odd": outputs[is_odd].mean() if int(batch["id"][0]) >= 16 else None,
        }
        texts = [f"row {index}" for index in batch["id"].tolist()]
        return {"logits": outputs, "text": texts, "loss": loss}, values


def measure(model: torch.nn.Module, kind: str, **options: Any) -> dict[str, Any]:
    """Return named values, predictions and the samples of this rank for 29 rows."""
    loader: Any = make_evaluation_loader(29)
    if kind == "shuffled":
        loader = make_evaluation_loader(29, shuffle=True)
    elif kind == "stream":
        loader = DataLoader(Stream(29), batch_size=8)
    processor = Measure()
    evaluator = Evaluator(model, processor, {"val": loader}, **options)
    values = evaluator.evaluate()
    seen, processor.seen = processor.seen, []
    predictions = evaluator.predict()["val"]
    logits = predictions.outputs["logits"]
    assert isinstance(logits, torch.Tensor)
    return {
        "values": values,
        "seen": seen,
        "indices": predictions.indices,
        "text": predictions.outputs["text"],
        "logits": logits.tolist(),
    }


LIMITS = (None, 1, 2, 3)


def named(accelerator: Accelerator, counter: CollectiveCounter) -> dict[str, Any]:
    """Measure with limits of batches; rank 1 has no batch of the smallest."""
    model = accelerator.prepare(make_model())
    return {
        f"{kind} {limit}": measure(model, kind, accelerator=accelerator, max_batches=limit)
        for kind in ("plain", "shuffled", "stream")
        for limit in LIMITS
    }


def monitored(accelerator: Accelerator, counter: CollectiveCounter) -> dict[str, Any]:
    """Train with a monitored value of two weight sets, from one batch: rank 1 has none."""
    found: list[float] = []
    watch = PipelineHooks("watch")
    watch.on_loop.before(
        lambda args: args.metrics.subscribe("eval/val/ema/l1", lambda v: found.append(v.value))
    )
    validation = ValidationHookConfig(
        every="2 steps", weights={"raw": None, "ema": "EMA"}, max_batches=1
    )(dataloaders={"val": make_evaluation_loader(29)})

    class Both(Measure):
        def forward(self, model: Any, batch: Batch) -> Any:
            return Classify.forward(self, model, batch)

    model = make_model()
    trainer = HookBasedTrainer(
        accelerator,
        model,
        make_evaluation_loader(40),
        Both(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[EMAConfig(decay=0.5), watch, validation],
        max_step=2,
    )
    trainer()
    values = {name: trainer.metrics.last_value(name) for name in trainer.metrics.names()}
    again = trainer.evaluate(
        {"val": make_evaluation_loader(29)}, weights={"ema": "EMA"}, max_batches=1
    )
    averaged = trainer.predict(make_evaluation_loader(29), weights="EMA")
    logits = averaged.outputs["logits"]
    assert isinstance(logits, torch.Tensor)
    return {"found": found, "values": values, "again": again, "averaged": logits.tolist()}


def sample_sharded() -> dict[str, Any]:
    """Train a sharded model, and sample from its averaged weights in a hook."""
    model = make_normalised()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    found: dict[str, Any] = {}
    sample = PipelineHooks("sample")

    @sample.on_loop.after
    def draw(args: PipelineHookArgs) -> None:
        with args.evaluating() as own:
            found["own"] = own(torch.ones(1, 4)).tolist()
        with args.evaluating(weights="EMA") as averaged:
            found["sampled"] = averaged(torch.ones(1, 4)).tolist()
        found["is_sharded"] = all(hasattr(p, "to_local") for p in args.model.parameters())
        plain = make_normalised().eval()
        plain.load_state_dict(args.run.weight_set("EMA").weights())
        found["plain"] = plain(torch.ones(1, 4)).tolist()

    HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        make_evaluation_loader(40),
        Classify(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[EMAConfig(decay=0.5), sample],
        max_step=2,
    )()
    return found


def in_a_hook(accelerator: Accelerator, counter: CollectiveCounter) -> dict[str, Any]:
    """Sample on all ranks, and on the first rank alone, from a model with batch statistics."""
    plain = make_normalised()
    model = accelerator.prepare(plain)
    run = PipelineRun.standalone(accelerator=accelerator, model=model)
    for _ in range(3):
        model(torch.randn(16, 4) + accelerator.process_index)
    before, rng = buffers_of(plain), torch.get_rng_state()
    args = PipelineHookArgs(run)
    counter.take()
    with args.evaluating() as shared:
        together = shared(torch.ones(1, 4)).tolist()
    calls = counter.take()
    alone = None
    if accelerator.is_main_process:
        with args.evaluating(rank_local=True) as own:
            alone = own(torch.ones(1, 4)).tolist()
    calls += counter.take()
    return {
        "together": together,
        "alone": alone,
        "calls": calls,
        "restored": equal(before, buffers_of(plain)) and torch.equal(rng, torch.get_rng_state()),
        "trains": plain.training,
        "sharded": sample_sharded(),
    }


RUNS: dict[str, Callable[[Accelerator, CollectiveCounter], dict[str, Any]]] = {
    "by_size": by_size,
    "with_buffers": with_buffers,
    "refused": refused,
    "while_training": while_training,
    "tracked": tracked,
    "named": named,
    "monitored": monitored,
    "in_a_hook": in_a_hook,
}


def run_on_ranks(folder: Path, *runs: str) -> list[dict[str, Any]]:
    """Return the results of some of :data:`RUNS` on two ranks, by name."""
    launch(__file__, folder, *runs)
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]


def main(folder: Path, runs: list[str]) -> None:
    accelerator, counter = Accelerator(cpu=True), CollectiveCounter()
    found = {run: RUNS[run](accelerator, counter) for run in runs}
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    end_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
