"""Cost of an evaluation pass with mean loss and accuracy, compared with a plain loop.

All contenders compute the accuracy with the same torchmetrics metric, model and batches, and must
agree with the plain loop. A pass has 500 batches of 16; its start and end are included.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.environment import describe
from benchmarks.overhead import DISTRIBUTIONS
from benchmarks.report import Report, Row, Table
from benchmarks.timing import interleave
from benchmarks.workload import CLASSES, Batch, Job, Settings
from robo_orchard_lab.pipeline import SimpleBatchProcessor
from robo_orchard_lab.pipeline.evaluator import Evaluator

PLAIN = "plain loop, inference_mode"
OURS = "this project's Evaluator"
Found = tuple[float, float]
"""The mean loss and the accuracy."""


def run(*, quick: bool) -> Report:
    torch.set_num_threads(1)
    job = Job(Settings(steps=200 if quick else 500))
    passes: dict[str, Callable[[], Found]] = {
        PLAIN: partial(_plain, job),
        "Accelerate, plain loop": partial(_accelerate, job),
        OURS: _ours(job),
    }
    absent = []
    for name, prepare in {} if quick else PEERS.items():
        try:
            measure = prepare(job)
            measure()
        except Exception as error:  # any error of a framework that does not fit this machine
            absent.append(Row(name, note=f"not measured: {str(error).partition(chr(10))[0]}"))
        else:
            passes[name] = measure
    found = {name: measure() for name, measure in passes.items()}
    faults = [
        f"{name} finds {values}, the plain loop {found[PLAIN]}"
        for name, values in found.items()
        if max(abs(value - right) for value, right in zip(values, found[PLAIN], strict=True)) > 1e-4
    ]
    timed = {name: partial(_seconds, measure) for name, measure in passes.items()}
    samples = interleave(timed, reference=PLAIN, rounds=3 if quick else 15)
    rows = [
        Row.of(
            name,
            values,
            reference=samples.references.get(name),
            scale=1e6 / job.settings.steps,
        )
        for name, values in samples.values.items()
    ]
    table = Table("One pass with a metric", "us per batch", [*rows, *absent])
    return Report("evaluation", [table], faults, describe([*DISTRIBUTIONS, "torchmetrics"]))


def _seconds(measure: Callable[[], object]) -> float:
    begin = perf_counter()
    measure()
    return perf_counter() - begin


def _accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(CLASSES, average="micro", validate_args=False)


def _plain(job: Job) -> Found:
    model, metric = job.model, _accuracy()
    loss_sum, count = torch.zeros(()), 0
    model.eval()
    with torch.inference_mode():
        for inputs, labels in job.loader:
            logits = model(inputs)
            loss_sum += job.loss(logits, labels) * len(labels)
            count += len(labels)
            metric.update(logits, labels)
        return float(loss_sum) / count, float(metric.compute())


def _accelerate(job: Job) -> Found:
    accelerator = Accelerator(cpu=True)
    model, loader = accelerator.prepare(job.model, job.loader)
    metric = _accuracy()
    loss_sum, count = torch.zeros(()), 0
    model.eval()
    with torch.inference_mode():
        for inputs, labels in loader:
            logits = model(inputs)
            loss_sum += job.loss(logits, labels) * len(labels)
            count += len(labels)
            metric.update(*accelerator.gather_for_metrics((logits, labels)))
        return float(loss_sum) / count, float(metric.compute())


def _ours(job: Job) -> Callable[[], Found]:
    def forward(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = batch
        logits = model(inputs)
        return logits, job.loss(logits, labels)

    evaluator = Evaluator(
        job.model,
        SimpleBatchProcessor.from_callable(forward),
        {"val": job.loader},
        metrics={"accuracy": _accuracy()},
        metric_inputs=lambda outputs, batch: (outputs, batch[1]),
        accelerator=Accelerator(cpu=True),
    )

    def measure() -> Found:
        values = evaluator.evaluate()
        return values["val/loss"], values["val/accuracy"]

    return measure


def _ignite(job: Job) -> Callable[[], Found]:
    from ignite.engine import Engine, Events  # type: ignore[import-not-found]  # no dev extra

    model, metric = job.model, _accuracy()
    totals: dict[str, Any] = {}

    def step(engine: Any, batch: Batch) -> None:
        inputs, labels = batch
        with torch.inference_mode():
            logits = model(inputs)
            totals["loss"] += job.loss(logits, labels) * len(labels)
            totals["count"] += len(labels)
            metric.update(logits, labels)

    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: model.eval())

    def measure() -> Found:
        metric.reset()
        totals.update(loss=torch.zeros(()), count=0)
        engine.run(job.loader, max_epochs=1)
        return float(totals["loss"]) / totals["count"], float(metric.compute())

    return measure


def _lightning(job: Job) -> Callable[[], Found]:
    import logging
    import warnings

    import lightning  # type: ignore[import-not-found]  # not in the dev extra

    from benchmarks.contenders.lightning_peer import Module

    class Validated(Module):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self.accuracy = _accuracy()

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            inputs, labels = batch
            logits = self.model(inputs)
            self.log("loss", self.job.loss(logits, labels), batch_size=len(labels))
            self.accuracy.update(logits, labels)
            self.log("accuracy", self.accuracy, batch_size=len(labels))

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Validated(job)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    def measure() -> Found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about workers and the like
            values = trainer.validate(module, job.loader, verbose=False)[0]
        return values["loss"], values["accuracy"]

    return measure


PEERS: dict[str, Callable[[Job], Callable[[], Found]]] = {
    "Ignite": _ignite,
    "Lightning": _lightning,
}
