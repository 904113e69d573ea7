"""Hook that freezes parameters, temporarily or for the complete run."""

from __future__ import annotations

import torch
from accelerate.utils import DistributedType
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import (
    all_named_parameters,
    match_parameters,
    plain_model,
    suggest_pattern,
)
from robo_orchard_lab.pipeline.progress import TrainerLimits
from robo_orchard_lab.pipeline.sharding import is_sharded_model

logger = job_logger(__name__)

# Engines with gradients of their own, out of reach of hooks.
_OWN_GRADIENTS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class FreezeHook(PipelineHooks):
    """Frozen parameters, selected by name patterns, from the start of the run.

    >>> from accelerate import Accelerator
    >>> from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    >>> before = [parameter.detach().clone() for parameter in model.parameters()]
    >>> processor = SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(batch)))
    >>> HookBasedTrainer(
    ...     Accelerator(cpu=True), model, [torch.ones(1)] * 2, processor,
    ...     torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5),
    ...     hooks=[FreezeHookConfig(patterns=["0.*"])], max_epoch=1,
    ... )()
    >>> [torch.equal(a, b) for a, b in zip(before, model.parameters())]
    [True, True, False, False]

    A frozen parameter has no gradient, so torch's optimizers leave its value, momentum and weight
    decay alone. Give the optimizer all parameters to be trained at any time. The thaw follows the
    counters, so a resumed run is exact. Parameters frozen before the run stay frozen. At the end of
    the run, also after an error, the hook's parameters are trainable again.

    - Ranks: all.
    - State: none; the counters decide.
    - Cost: a comparison per step. With one process or FSDP2, no gradients of frozen parameters are
      computed. With DDP, these gradients are computed, exchanged and dropped, because DDP's
      reducer waits for all parameters trainable at its construction. For parameters that are never
      trained, call ``requires_grad_(False)`` before creating the trainer instead.
    """

    reads = ()
    changes = ("model.requires_grad", "gradients")
    requests = ()

    def __init__(self, cfg: FreezeHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.eval_mode:
            self.declare_effects(changes=["model.mode"])
        limits = (cfg.until_step, cfg.until_optimizer_step, cfg.until_epoch)
        self._until = TrainerLimits(*limits) if any(limits) else None
        self._parameters: list[torch.nn.Parameter] = []
        self._modules: list[torch.nn.Module] = []
        self._training_modules: list[torch.nn.Module] = []
        self._should_drop = False
        self._is_frozen = False
        self.register_hook("on_loop", HookContext.from_callable(self._begin, self._thaw))
        self.on_step.before(self._before_step)
        self.on_model_backward.after(self._drop_gradients)

    def _begin(self, args: PipelineHookArgs) -> None:
        if args.accelerator.distributed_type in _OWN_GRADIENTS:
            raise PipelineConfigError(
                f"{self.name} can't keep {args.accelerator.distributed_type.value} from updating "
                "parameters; call requires_grad_(False) on them before creating the trainer"
            )
        model = plain_model(args.run)
        matched = self._match(model)
        self._parameters = [parameter for parameter in matched if parameter.requires_grad]
        if self.cfg.eval_mode:
            self._modules = _frozen_modules(model, set(matched))
        several = args.accelerator.num_processes > 1
        self._should_drop = several and not is_sharded_model(model)
        if not self._is_over(args):
            self._freeze()
        left = sum(parameter.requires_grad for parameter in model.parameters())
        if self._is_frozen and left == (len(self._parameters) if self._should_drop else 0):
            logger.warning("%s froze all parameters of the model", self.name)

    def _match(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        """Return the parameters matched by any pattern; a tied parameter matches by any name."""
        named = all_named_parameters(model)
        found: list[torch.nn.Parameter] = []
        for pattern in self.cfg.patterns:
            matched = match_parameters(pattern, named)
            if not matched:
                raise PipelineConfigError(
                    f"{self.name}.patterns: {pattern!r} matches no parameter; "
                    f"{suggest_pattern(pattern, named)}"
                )
            found += matched
        return list(dict.fromkeys(found))

    def _before_step(self, args: PipelineHookArgs) -> None:
        over = self._is_over(args)
        if self._is_frozen is over:
            if over:
                self._thaw(args)
            else:
                self._freeze()  # the counters went back
        elif self._is_frozen:
            for module in self._modules:
                if module.training:  # other code called model.train()
                    module.eval()

    def _is_over(self, args: PipelineHookArgs) -> bool:
        return self._until is not None and self._until.reached(args.progress)

    def _freeze(self) -> None:
        self._is_frozen = True
        self._training_modules = [
            child for module in self._modules for child in module.modules() if child.training
        ]
        for module in self._modules:
            module.eval()
        for parameter in self._parameters:
            parameter.grad = None
            if not self._should_drop:
                parameter.requires_grad_(False)

    def _drop_gradients(self, args: PipelineHookArgs) -> None:
        if self._is_frozen and self._should_drop:
            for parameter in self._parameters:
                parameter.grad = None

    def _thaw(self, args: PipelineHookArgs) -> None:
        if self._is_frozen:
            self._is_frozen = False
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            for module in self._training_modules:
                module.training = True


class FreezeHookConfig(PipelineHooksConfig[FreezeHook]):
    """Patterns of the parameters to freeze, and the time of the thaw.

    >>> FreezeHookConfig(patterns=["encoder.*"], until_step=1000, eval_mode=True)().name
    'FreezeHook'
    """

    class_type: type[FreezeHook] = FreezeHook
    patterns: list[str] = Field(
        min_length=1,
        description="Patterns of parameter names in the plain model: * matches any text "
        "(including dots), ? one character, [ab] one of several. Each pattern must match.",
    )
    until_step: int | None = Field(
        default=None, ge=1, description="Thaw after this many steps of the run."
    )
    until_optimizer_step: int | None = Field(
        default=None, ge=1, description="Thaw after this many committed updates."
    )
    until_epoch: int | None = Field(default=None, ge=1, description="Thaw after this many epochs.")
    eval_mode: bool = Field(
        default=False,
        description="Keep modules without trainable parameters in evaluation mode, so that "
        "dropout is off and BatchNorm keeps its statistics.",
    )


def _frozen_modules(
    model: torch.nn.Module, matched: set[torch.nn.Parameter]
) -> list[torch.nn.Module]:
    """Return the outermost modules with a matched and no trainable parameter."""
    found: list[torch.nn.Module] = []
    inner: set[torch.nn.Module] = set()
    for module in model.modules():  # outer modules first
        parameters = set(module.parameters())
        is_frozen = all(p in matched or not p.requires_grad for p in parameters)
        if is_frozen and parameters & matched and module not in inner:
            found.append(module)
            inner.update(module.modules())
    return found
