"""Hook that logs the size of the model, module by module."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from pydantic import Field
from torch.nn.parameter import is_lazy

from robo_orchard_core.utils.logging import aligned_lines
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import plain_model, plain_name, uncompiled
from robo_orchard_lab.pipeline.sharding import plain_class

logger = job_logger(__name__)

_ROOT = "(itself)"  # tensors of the model itself


class ModelSummary(PipelineHooks):
    """Table of the model's parameters and size, logged once at the start of a run.

    The table is the one of :func:`summarize`. Register the hook after hooks that freeze parameters.

    - Ranks: the main process logs one INFO record.
    - State: none.

    >>> hooks = PipelineHooks.from_hooks([ModelSummaryConfig(depth=2)])
    >>> len(hooks.get_channel("on_loop"))
    1
    """

    keeps_trajectory = True
    reads = ("model",)
    changes = ()
    requests = ()

    def __init__(self, cfg: ModelSummaryConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.on_loop.before(self._log)

    def _log(self, args: PipelineHookArgs) -> None:
        if logger.isEnabledFor(logging.INFO):
            logger.info("the model:\n%s", summarize(plain_model(args.run), self.cfg.depth))


class ModelSummaryConfig(PipelineHooksConfig[ModelSummary]):
    """Depth of the table.

    >>> ModelSummaryConfig()().name
    'ModelSummary'
    """

    class_type: type[ModelSummary] = ModelSummary
    depth: int = Field(
        default=1,
        ge=0,
        description="Levels of modules with rows of their own; 0 shows only the total.",
    )


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """Parameters and size of one module."""

    name: str
    """Path, as in the names of its parameters."""
    kind: str
    """Class name."""
    trainable: int
    """Elements of parameters with ``requires_grad``."""
    frozen: int
    """Elements of the other parameters."""
    size_bytes: int
    """Of parameters and buffers."""

    @classmethod
    def of(cls, name: str, module: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> ModuleSize:
        """Add up parameters and buffers of a module; lazy parameters count as 0."""
        known = [tensor for tensor in tensors if not is_lazy(tensor)]
        parameters = [tensor for tensor in known if isinstance(tensor, torch.nn.Parameter)]
        return cls(
            name,
            plain_class(uncompiled(module)).__name__,
            sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            sum(parameter.numel() for parameter in parameters if not parameter.requires_grad),
            sum(tensor.numel() * tensor.element_size() for tensor in known),
        )


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Rows of a model's modules and their total; ``str`` is a table."""

    parts: tuple[ModuleSize, ...]
    total: ModuleSize

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
        return "\n".join(aligned_lines(rows, left=2))


def summarize(model: torch.nn.Module, depth: int = 1) -> ModelSize:
    """Return a table of a model's trainable and frozen parameters and its size, by module.

    >>> model = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Linear(256, 10))
    >>> _ = model[0].requires_grad_(False)
    >>> print(summarize(model))
    module  type        trainable   frozen   MiB
    0       Linear              0  131,328  0.50
    1       Linear          2,570        0  0.01
    total   Sequential      2,570  131,328  0.51

    Args:
        model: a module, also compiled; modules without tensors have no row.
        depth: levels of modules with rows of their own; deeper modules count in their parent's row.

    A shared tensor counts once, in the first module. A lazy parameter counts as 0. Buffers, also
    non-persistent ones, count only in the size. Of a sharded model, full tensors count, not shards.
    """
    model = uncompiled(model)
    tensors: dict[str, list[torch.Tensor]] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        path = plain_name(name).split(".")[:-1][:depth]
        tensors.setdefault(".".join(path), []).append(tensor)
    parts = [ModuleSize.of(p or _ROOT, model.get_submodule(p), own) for p, own in tensors.items()]
    total = ModuleSize.of("total", model, chain.from_iterable(tensors.values()))
    return ModelSize(tuple(parts) if depth else (), total)
