"""Export of a run's model by torch.export or to ONNX, checked against the live model."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from accelerate.utils import recursively_apply

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.evaluation import evaluating
from robo_orchard_lab.experiment.initial_weights import SavedWeights
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.run.durable import replace_file

ExportFormat: TypeAlias = Literal["torch-export", "onnx"]

SUFFIXES: Mapping[ExportFormat, str] = {"torch-export": ".pt2", "onnx": ".onnx"}
"""Suffix of the file by format."""


@dataclass(frozen=True)
class ExportedModel:
    """File of an exported model.

    Attributes:
        inputs: Shapes of the inputs, ``-1`` for the size of a batch.
        difference: Largest absolute difference from the live model's outputs.
        batch_sizes: Batch sizes of the comparison.
    """

    path: Path
    inputs: list[list[int]]
    difference: float
    batch_sizes: list[int]


@dataclass(frozen=True)
class _Call:
    """Arguments of one call of the model, on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def batch_size(self) -> int:
        """Most frequent first size of the tensors."""
        sizes = Counter(tensor.shape[0] for tensor in _tensors([self.args, self.kwargs]))
        return sizes.most_common(1)[0][0]

    def cut(self, size: int) -> _Call:
        """Return the call with the first samples of the batch."""
        batch_size = self.batch_size

        def first(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:size].clone() if tensor.shape[:1] == (batch_size,) else tensor

        return _Call(*recursively_apply(first, (self.args, self.kwargs)))


def export_model(
    experiment: ExperimentConfig,
    saved: SavedWeights,
    path: Path,
    *,
    format: ExportFormat,  # noqa: A002 - the public word
    data: str,
    weights: str | None = None,
    tolerance: float = 1e-5,
) -> ExportedModel:
    """Export a model with the inputs of its first call on a set, with a dynamic batch size.

    The batch processor calls the model with a batch of the data set. The exported model accepts the
    same arguments, with any batch size from 1 on. Before the file is written, its outputs are
    compared with those of the live model, for the batch, half of it, and one sample.

    Args:
        experiment: Experiment of the run.
        saved: Weights to use.
        path: File to write; an existing one is replaced.
        format: ``torch-export`` for `torch.export.load`, or ``onnx``.
        data: Name of an evaluation or test set, or ``train``.
        weights: Name of the hook whose weights to use; None for the model's own.
        tolerance: Largest absolute and relative difference of an output.

    Raises:
        ConfigError: The set or the weights don't exist, or a part can't be built.
        PipelineConfigError: The model can't be exported, a package is missing, or the outputs
            differ.
    """
    with evaluating(experiment, saved, data, weights=weights, max_batches=1) as (args, evaluator):
        model = plain_model(args.run)
        calls: list[_Call] = []

        def record(_: Any, call_args: tuple[Any, ...], call_kwargs: dict[str, Any]) -> None:
            if not calls:
                on_cpu = recursively_apply(_to_cpu, (call_args, call_kwargs))
                calls.append(_Call(*on_cpu))

        with model.register_forward_pre_hook(record, with_kwargs=True):
            evaluator.evaluate()
        if not calls or not [*_tensors([calls[0].args, calls[0].kwargs])]:
            raise ConfigFieldError(
                "expected a batch processor that calls the model with tensors, found no such "
                "call; export the part that it calls in a script",
                ("batch_processor",),
            )
        model = copy.deepcopy(model).cpu().float().eval()
    call = calls[0]
    if call.batch_size < 2:
        raise PipelineConfigError(
            f"expected a batch of at least 2 samples in {data}, found {call.batch_size}; the batch "
            "size would be fixed; set a larger batch_size"
        )
    with torch.no_grad():
        outputs = [*_tensors(model(*call.args, **call.kwargs))]
    if not any(output.shape[:1] == (call.batch_size,) for output in outputs):
        raise PipelineConfigError(
            f"expected an output of {type(model).__name__} with a row for each sample, found "
            f"{', '.join(str([*output.shape]) for output in outputs) or 'no tensor'}: a loss is "
            "nothing to export; export a policy with robo_orchard_lab.policy.export_policy"
        )
    content, run = (_to_onnx if format == "onnx" else _to_torch_export)(model, call)
    sizes = sorted({call.batch_size, call.batch_size // 2, 1}, reverse=True)
    difference = max(_difference(model, run, call.cut(size), tolerance) for size in sizes)
    replace_file(path, content)
    shapes = [
        [-1 if n == 0 and size == call.batch_size else size for n, size in enumerate(tensor.shape)]
        for tensor in _tensors([call.args, call.kwargs])
    ]
    return ExportedModel(path, shapes, difference, sizes)


def check_packages(format: ExportFormat) -> None:  # noqa: A002 - the public word
    """Refuse ONNX without its packages, before anything is built."""
    if format != "onnx":
        return
    try:
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]  # noqa: F401
        import onnxscript  # type: ignore[import-untyped,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise PipelineConfigError(
            f"the format onnx requires {error.name}, which is not installed; "
            'pip install "robo-orchard-hooks[onnx]"'
        ) from error


def _to_torch_export(model: torch.nn.Module, call: _Call) -> tuple[bytes, Any]:
    program = _captured(model, call)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda other: [*_tensors(loaded(*other.args, **other.kwargs))]


def _to_onnx(model: torch.nn.Module, call: _Call) -> tuple[bytes, Any]:
    import onnxruntime

    captured = _captured(model, call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about its own code
        for name in ("onnx_ir", "onnxscript"):  # log each optimization
            logging.getLogger(name).setLevel(logging.WARNING)
        program = torch.onnx.export(captured, dynamo=True, verbose=False)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(other: _Call) -> list[torch.Tensor]:
        arrays = [tensor.numpy() for tensor in _tensors([other.args, other.kwargs])]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in found]

    return content, run


def _captured(model: torch.nn.Module, call: _Call) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    size = call.batch_size

    def dynamic(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {0: batch} if value.shape[:1] == (size,) else None
        if isinstance(value, Mapping):
            return {key: dynamic(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([dynamic(part) for part in value])
        return None

    # Arguments by name, in the order of the model's forward.
    shapes = (*map(dynamic, call.args), *map(dynamic, call.kwargs.values()))
    try:
        return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes)
    except Exception as error:  # of the model's own code, or of torch.export
        text = str(error).strip().partition("\n")[0]
        raise PipelineConfigError(
            f"torch.export can't export {type(model).__name__}: {type(error).__name__}: {text}; "
            "see https://docs.pytorch.org/docs/stable/export.html for what it supports"
        ) from error


@torch.no_grad()
def _difference(model: torch.nn.Module, run: Any, call: _Call, tolerance: float) -> float:
    """Return the largest difference between the exported and the live model's outputs."""
    expected = [*_tensors(model(*call.args, **call.kwargs))]
    found = run(call)
    if len(expected) != len(found):
        raise PipelineConfigError(
            f"expected {len(expected)} outputs of the exported model, found {len(found)}"
        )
    largest = 0.0
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        is_close = one.shape == other.shape and torch.allclose(
            other.double(), one.double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )
        difference = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        if not is_close:
            raise PipelineConfigError(
                f"output {number} of the exported model differs by {difference:.3g} for a batch of "
                f"{call.batch_size}, more than the tolerance {tolerance:g}; nothing was written; "
                "does the model use random numbers in evaluation? else pass a larger --tolerance"
            )
        largest = max(largest, difference)
    return largest


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested sequences, mappings and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for part in value:
            yield from _tensors(part)


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()
