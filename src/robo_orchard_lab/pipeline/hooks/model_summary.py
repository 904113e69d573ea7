"""Say how large a model is, part by part."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain

import torch
from pydantic import Field
from torch.nn.parameter import is_lazy

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import plain_model, plain_name
from robo_orchard_lab.pipeline.sharding import plain_class

logger = job_logger(__name__)

_ROOT = "(itself)"  # what belongs to no part


class ModelSummary(PipelineHooks):
    """Logs, once at the start of a run, what :func:`summarize` tells.

    On the main process alone, as one record of level INFO. It counts as frozen what is frozen at
    that moment, so register it after what freezes.

    >>> hooks = PipelineHooks.from_hooks([ModelSummaryConfig(depth=2)])
    >>> len(hooks.get_channel("on_loop"))
    1
    """

    keeps_trajectory = True

    def __init__(self, cfg: ModelSummaryConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_hook("on_loop", HookContext.from_callable(before=self._tell))

    def _tell(self, args: PipelineHookArgs) -> None:
        if logger.isEnabledFor(logging.INFO):
            logger.info("the model:\n%s", summarize(plain_model(args.run), self.cfg.depth))


class ModelSummaryConfig(PipelineHooksConfig[ModelSummary]):
    """How much to tell.

    >>> ModelSummaryConfig()().name
    'ModelSummary'
    """

    class_type: type[ModelSummary] = ModelSummary
    depth: int = Field(
        default=1, ge=0, description="In levels of modules; 0 tells of the whole model alone."
    )


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What one part of a model holds."""

    name: str
    """As in the names of its parameters."""
    kind: str
    """The name of its class."""
    trainable: int = 0
    """Elements of parameters that require a gradient."""
    frozen: int = 0
    """Elements of the other parameters."""
    size_bytes: int = 0
    """Of parameters and buffers."""

    def plus(self, tensor: torch.Tensor) -> ModelPart:
        """The part with one parameter or buffer more."""
        if is_lazy(tensor):
            return self
        count = tensor.numel()
        parameter = isinstance(tensor, torch.nn.Parameter)
        return ModelPart(
            self.name,
            self.kind,
            self.trainable + (count if parameter and tensor.requires_grad else 0),
            self.frozen + (count if parameter and not tensor.requires_grad else 0),
            self.size_bytes + count * tensor.element_size(),
        )


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The parts of a model and their total; ``str`` of it is a table."""

    parts: tuple[ModelPart, ...]
    total: ModelPart

    def __str__(self) -> str:
        rows = [("module", "type", "trainable", "frozen", "MiB")]
        rows += [
            (
                part.name,
                part.kind,
                f"{part.trainable:,}",
                f"{part.frozen:,}",
                f"{part.size_bytes / 2**20:,.2f}",
            )
            for part in (*self.parts, self.total)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                text.ljust(width) if column < 2 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def summarize(model: torch.nn.Module, depth: int = 1) -> ModelSize:
    """The elements of a model's parameters, trainable and frozen, and its size, part by part.

    >>> model = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Linear(256, 10))
    >>> _ = model[0].requires_grad_(False)
    >>> print(summarize(model))
    module  type        trainable   frozen   MiB
    0       Linear              0  131,328  0.50
    1       Linear          2,570        0  0.01
    total   Sequential      2,570  131,328  0.51

    Args:
        model: also one that is compiled; a part that holds nothing has no row.
        depth: the levels of modules that have a row each; deeper ones count in theirs.

    A tensor that is used in several places counts in the first. One that gets its shape from the
    first batch counts nothing. Buffers count in the size alone, whether they are saved or not. Of a
    sharded model the whole tensors count, not the shards.
    """
    model = getattr(model, "_orig_mod", model)
    parts: dict[str, ModelPart] = {}
    total = ModelPart("total", plain_class(model).__name__)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        path = plain_name(name).split(".")[:-1][:depth]
        part = ".".join(path)
        if part not in parts:
            module = model.get_submodule(part)
            kind = plain_class(getattr(module, "_orig_mod", module)).__name__
            parts[part] = ModelPart(part or _ROOT, kind)
        parts[part] = parts[part].plus(tensor)
        total = total.plus(tensor)
    return ModelSize(tuple(parts.values()) if depth else (), total)
