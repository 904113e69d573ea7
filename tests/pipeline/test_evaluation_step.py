"""Evaluation with a step of its own: named values, limits, predictions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torchmetrics import MeanAbsoluteError

from evaluate_on_ranks import (
    LIMITS,
    Measure,
    make_evaluation_loader,
    make_normalised,
    measure,
    run_on_ranks,
)
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import (
    BatchProcessorError,
    PipelineConfigError,
    PipelineStateError,
)
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import EMAConfig
from tiny import loss_of, make_loader, make_model, make_trainer

BATCHES = [(torch.zeros(3, 1), torch.zeros(3, 1)), (torch.ones(1, 1), torch.zeros(1, 1))]
"""Three samples with an error of 0, and one with an error of 1, for a model that adds nothing."""


def evaluate(step: Callable[[Any, Any], Any], **options: Any) -> dict[str, float]:
    """Evaluate an evaluation step on `BATCHES` with a model that returns its inputs."""
    processor = SimpleBatchProcessor.from_callable(loss_of, evaluation_forward=step)
    return Evaluator(torch.nn.Identity(), processor, {"val": BATCHES}, **options).evaluate()


def error_of(model: Any, batch: Any) -> torch.Tensor:
    error: torch.Tensor = (model(batch[0]) - batch[1]).abs().mean()
    return error


def test_named_values_are_means_over_samples() -> None:
    """Tensors, numbers and values of some batches are weighted by samples."""

    def step(model: Any, batch: Any) -> Any:
        error = error_of(model, batch)
        rare = error if len(batch[0]) == 1 else None
        return model, {"loss": 2 * error, "l1": error[None], "size": len(batch[0]), "rare": rare}

    found = evaluate(step)
    assert found == {"val/loss": 0.5, "val/l1": 0.25, "val/size": 2.5, "val/rare": 1.0}


def test_one_loss_keeps_its_name() -> None:
    """A step with one loss publishes the name of an evaluation without a step."""
    assert evaluate(lambda model, batch: (None, error_of(model, batch))) == {"val/loss": 0.25}


def test_named_values_have_a_weight() -> None:
    """A weight applies to all values; values of weight 0 may be NaN."""

    def step(model: Any, batch: Any) -> Any:
        weight = torch.tensor(1.0 if len(batch[0]) == 1 else 0.0)
        nan = float("nan") if len(batch[0]) == 3 else 4.0
        return None, {"a": torch.tensor(nan), "b": nan, "c": torch.tensor(6.0)}, weight

    assert evaluate(step) == {"val/a": 4.0, "val/b": 4.0, "val/c": 6.0}


def test_values_without_any_weight_are_nan() -> None:
    """A value whose weights are all 0 is NaN, as a mean on the board; no value stays absent."""

    def step(model: Any, batch: Any) -> Any:
        return None, {"a": error_of(model, batch), "b": 1.0, "c": None}, 0

    found = evaluate(step)
    assert {*found} == {"val/a", "val/b"}
    assert all(map(math.isnan, found.values()))


def test_metrics_use_the_outputs_of_the_step() -> None:
    """Metrics get the outputs of the evaluation step, also without a loss."""

    def step(model: Any, batch: Any) -> Any:
        return model(batch[0]) * 2, None

    found = evaluate(step, metrics={"error": MeanAbsoluteError()})
    assert found == {"val/error": 0.5}


def by_mapping(model: Any, batch: Any) -> Any:
    error = error_of(model, batch)
    return None, {"g": error, "d": 2 * error}


def by_steps(model: Any, batch: Any) -> Any:
    error = error_of(model, batch)
    yield "g", error
    yield "d", 2 * error
    return None


@pytest.mark.parametrize("forward", [by_mapping, by_steps])
def test_losses_of_several_optimizers_have_their_names(forward: Any) -> None:
    """A forward with a loss for each optimizer is evaluated without updates."""
    processor = SimpleBatchProcessor.from_callable(forward)
    found = Evaluator(torch.nn.Identity(), processor, {"val": BATCHES}).evaluate()
    assert found == {"val/loss/g": 0.25, "val/loss/d": 0.5}


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda m, b: {"l1": 1.0}, BatchProcessorError, "must return .outputs, loss., with a sc"),
        (
            lambda m, b: (None, {"l1": torch.zeros(2)}),
            BatchProcessorError,
            r"evaluation_forward must return .* got a value named 'l1' that is a Tensor of shape",
        ),
        (lambda m, b: (None, {"l1": "low"}), BatchProcessorError, "'l1' that is a str"),
        (lambda m, b: (None, 3.0), BatchProcessorError, "a loss that is a float"),
        (lambda m, b: (None, {"": 1.0}), BatchProcessorError, "a value named '', which is no name"),
        (lambda m, b: (None, {3: 1.0}), BatchProcessorError, "a value named 3, which is no name"),
    ],
)
def test_wrong_results_are_refused(step: Any, error: type[Exception], message: str) -> None:
    """Each error names the step, what it returned, and what it should return."""
    with pytest.raises(error, match=message):
        evaluate(step)


@pytest.mark.parametrize("values", [None, {}, {"l1": None}])
def test_nothing_to_measure_is_refused(values: Any) -> None:
    """An evaluation without values has an error that names the step and the remedies."""
    step = SimpleBatchProcessor.from_callable(
        loss_of, evaluation_forward=lambda model, batch: (None, values)
    )
    with pytest.raises(PipelineConfigError, match=r"evaluation_forward returns no loss, .*pass me"):
        make_trainer(batch_processor=step, max_epoch=1).evaluate({"val": make_loader()})


def test_value_and_metric_of_one_name_are_refused() -> None:
    """A value named as a metric would hide the metric."""
    with pytest.raises(PipelineConfigError, match="and a metric both have a value named 'l1'"):
        evaluate(
            lambda model, batch: (model(batch[0]), {"l1": error_of(model, batch)}),
            metrics={"l1": MeanAbsoluteError()},
        )


def test_step_must_be_callable() -> None:
    """An attribute that is no function is refused at construction."""
    processor = SimpleBatchProcessor.from_callable(loss_of)
    processor.evaluation_forward = "l1"  # type: ignore[attr-defined]  # the mistake
    with pytest.raises(PipelineConfigError, match="evaluation_forward must be callable as"):
        Evaluator(make_model(), processor, {"val": make_loader()})
    with pytest.raises(TypeError, match="evaluation_forward must be callable"):
        SimpleBatchProcessor.from_callable(loss_of, evaluation_forward=3)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (0, r"Evaluator.max_batches: expected a number of batches >= 1, found 0"),
        (True, "found True"),
        (1.5, "found 1.5"),
        ({"val": None}, r"max_batches\['val'\]: expected a number"),
        ({"vall": 1}, "there is no loader 'vall'; did you mean 'val'"),
    ],
)
def test_wrong_limits_are_refused(limits: Any, message: str) -> None:
    """The error names the limit, and the loaders that exist."""
    with pytest.raises(PipelineConfigError, match=message):
        Evaluator(make_model(), Measure(), {"val": make_evaluation_loader(9)}, max_batches=limits)


@pytest.mark.parametrize("kind", ["plain", "shuffled", "stream"])
def test_limit_uses_the_first_batches(kind: str) -> None:
    """The samples of a limit are the first samples of the complete evaluation."""
    model = make_model()
    complete = measure(model, kind)
    for limit in (1, 2, 3, 9):
        limited = measure(model, kind, max_batches={"val": limit})
        assert limited["seen"] == complete["seen"][: 8 * limit]
    assert len(complete["seen"]) == 29


def test_limit_ends_an_endless_stream() -> None:
    """A loader without an end is evaluated up to its limit."""
    endless = {"val": itertools.cycle(BATCHES)}

    def step(model: Any, batch: Any) -> Any:
        return None, {"size": len(batch[0])}

    processor = SimpleBatchProcessor.from_callable(loss_of, evaluation_forward=step)
    evaluator = Evaluator(torch.nn.Identity(), processor, endless, max_batches=3)
    assert evaluator.evaluate() == {"val/size": (3 * 3 + 1 + 3 * 3) / 7}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of two processes."""
    return run_on_ranks(tmp_path_factory.mktemp("ranks"), "named", "monitored", "in_a_hook")


class TestOnTwoRanks:
    """Two processes get the values of one."""

    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize("kind", ["plain", "shuffled", "stream"])
    def test_values_and_predictions_equal_one_process(
        self, ranks: list[dict[str, Any]], kind: str, limit: int | None
    ) -> None:
        """The first batches of the job are measured and predicted once, in order."""
        expected = measure(make_model(), kind, max_batches=limit)
        found = [rank["named"][f"{kind} {limit}"] for rank in ranks]
        assert sorted(found[0]["seen"] + found[1]["seen"]) == sorted(expected["seen"])
        for rank in found:
            assert rank["values"] == pytest.approx(expected["values"])
            for name in ("indices", "text"):
                assert rank[name] == expected[name]
            torch.testing.assert_close(rank["logits"], expected["logits"])
        count = len(range(29)[: None if limit is None else 8 * limit])
        assert len(expected["indices"]) == count
        # Streams have positions, other loaders dataset indices.
        ids = range(count) if kind == "stream" else expected["indices"]
        assert expected["text"] == [f"row {index}" for index in ids]
        assert kind == "shuffled" or ("val/odd" in expected["values"]) == (limit in (None, 3))

    def test_monitored_value_is_the_same_on_both_ranks(self, ranks: list[dict[str, Any]]) -> None:
        """A rank without batches gets named values of two weight sets, during and after a run."""
        first, second = (rank["monitored"] for rank in ranks)
        assert first == second
        names = ("loss", "l1", "first_id")
        assert {*first["values"]} == {f"eval/val/{w}/{n}" for w in ("raw", "ema") for n in names}
        assert first["found"] == [first["values"]["eval/val/ema/l1"]]
        assert first["values"]["eval/val/raw/l1"] != first["values"]["eval/val/ema/l1"]
        assert first["again"] == {
            f"val/ema/{n}": first["values"][f"eval/val/ema/{n}"] for n in names
        }
        assert len(first["averaged"]) == 29

    def test_hooks_sample_on_all_ranks_or_on_one(self, ranks: list[dict[str, Any]]) -> None:
        """All ranks sample with the first rank's statistics, or one rank without a collective."""
        first, second = (rank["in_a_hook"] for rank in ranks)
        assert first["together"] == second["together"] == first["alone"]
        for rank in (first, second):
            assert rank["calls"] == ["broadcast"]
            assert rank["restored"]
            assert rank["trains"]

    def test_sharded_model_is_sampled(self, ranks: list[dict[str, Any]]) -> None:
        """All ranks have the outputs of the complete averaged model of the first rank."""
        first, second = (rank["in_a_hook"]["sharded"] for rank in ranks)
        torch.testing.assert_close(torch.tensor(first["sampled"]), torch.tensor(first["plain"]))
        assert first["sampled"] == second["sampled"] != first["own"] == second["own"]
        assert second["sampled"] != second["plain"]  # its own batch statistics
        assert first["is_sharded"]
        assert second["is_sharded"]


class TestTrainer:
    """Evaluation and prediction by a trainer, outside of a run."""

    @staticmethod
    def trainer(*hooks: Any, **options: Any) -> HookBasedTrainer:
        defaults = {"loader": make_evaluation_loader(24), "batch_processor": Both()}
        return make_trainer(hooks, **{**defaults, "max_epoch": 1, **options})

    def test_weights_are_evaluated_before_and_after_a_run(self, tmp_path: Path) -> None:
        """Values equal an evaluator's with the weights of each set, also of a resumed run."""
        loaders = {"val": make_evaluation_loader(11)}
        trainer = self.trainer(EMAConfig(decay=0.5))
        untrained = trainer.evaluate(loaders)
        assert untrained == Evaluator(make_model(), Both(), loaders).evaluate()
        trainer()
        both = trainer.evaluate(loaders, weights={"raw": None, "ema": "EMA"})
        assert trainer.evaluate(loaders) == {k.replace("raw/", ""): both[k] for k in list(both)[:3]}
        with trainer.hooks["EMA"].applied():  # type: ignore[attr-defined]  # an EMA
            expected = Evaluator(trainer.model, Both(), loaders).evaluate()
            rows = make_evaluation_loader(11).dataset.inputs  # type: ignore[attr-defined]  # of Rows
            logits = trainer.model(rows)
        assert trainer.evaluate(loaders, weights="EMA") == expected
        assert {k.replace("ema/", ""): both[k] for k in list(both)[3:]} == expected
        assert both["val/raw/l1"] != both["val/ema/l1"]
        predicted = trainer.predict(loaders["val"], weights="EMA").outputs["logits"]
        torch.testing.assert_close(predicted, logits.detach())
        trainer.save_checkpoint(tmp_path / "saved")
        resumed = self.trainer(EMAConfig(decay=0.5), resume_from=tmp_path / "saved")
        assert resumed.evaluate(loaders, weights={"raw": None, "ema": "EMA"}) == both

    def test_mistakes_are_refused(self) -> None:
        """Unknown weights, and a call from a hook, have an error with the remedy."""
        loaders = {"val": make_evaluation_loader(11)}
        calling = PipelineHooks("calling")
        trainer = self.trainer(EMAConfig(), calling)
        with pytest.raises(PipelineConfigError, match="'EMB' keeps weights; did you mean 'EMA'"):
            trainer.predict(loaders["val"], weights="EMB")
        calling.on_step.after(lambda args: trainer.evaluate(loaders) and None)
        with pytest.raises(PipelineStateError, match=r"in a hook, use args.evaluating\(\)"):
            trainer()


class Both(Measure):
    """Processor with a training step and an evaluation step."""

    def forward(self, model: Any, batch: Any) -> Any:
        outputs = model(batch["inputs"])
        return outputs, torch.nn.functional.cross_entropy(outputs, batch["target"])

    def evaluation_forward(self, model: Any, batch: Any) -> Any:
        outputs, values = super().evaluation_forward(model, batch)
        return outputs, {name: values[name] for name in ("loss", "l1", "first_id")}


def test_evaluation_restores_buffers_of_a_plain_model() -> None:
    """A model that counts its passes in a buffer keeps the count of the training."""
    model = make_normalised()
    model.register_buffer("passes", torch.zeros(()))
    loader = [torch.ones(2, 4)] * 3

    def step(model: Any, batch: Any) -> Any:
        model.passes += 1
        return None, model(batch).mean()

    processor = SimpleBatchProcessor.from_callable(step)
    Evaluator(model, processor, {"val": loader}, accelerator=Accelerator(cpu=True)).evaluate()
    assert dict(model.named_buffers())["passes"] == 0
