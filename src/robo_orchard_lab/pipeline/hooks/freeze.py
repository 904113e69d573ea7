"""Keep some of the weights as they are, for a while or for good."""

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

# These keep gradients where no hook can drop them.
_OWN_GRADIENTS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class FreezeHook(PipelineHooks):
    """Freezes parameters by the pattern of their names, from the start of the run.

    >>> import torch
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

    A frozen parameter has no gradient, so that torch's optimizers leave it, its momentum and its
    weight decay alone; give the optimizer all parameters that are ever to be trained. Where the
    thaw comes is decided from the counters, so that a resumed run is exact. What was frozen before
    the run stays frozen. When the run is over, also by an error, everything is trainable that was.

    It runs on every rank, and costs a look at the counters for each step. With one process, and in
    a sharded model (FSDP2), no gradients are computed for what is frozen. With DDP, they are
    computed, exchanged and then dropped: the engine that exchanges them was set up for all that was
    trainable when the trainer was made, and would wait for them. To save that, freeze with
    ``requires_grad_(False)`` ahead of making the trainer what is never to be trained.
    """

    def __init__(self, cfg: FreezeHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._until = cfg.until()
        self._parameters: list[torch.nn.Parameter] = []
        self._modules: list[torch.nn.Module] = []
        self._in_training: list[torch.nn.Module] = []
        self._drops_gradients = False
        self._frozen = False
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._begin, after=self._thaw)
        )
        self.register_hook("on_step", HookContext.from_callable(before=self._look))
        self.register_hook("on_model_backward", HookContext.from_callable(after=self._drop))

    def _begin(self, args: PipelineHookArgs) -> None:
        if args.accelerator.distributed_type in _OWN_GRADIENTS:
            raise PipelineConfigError(
                f"{self.name} can't keep {args.accelerator.distributed_type.value} from updating "
                "parameters; freeze them by requires_grad_(False) ahead of making the trainer"
            )
        model = plain_model(args.run)
        matched = self._match(model)
        self._parameters = [parameter for parameter in matched if parameter.requires_grad]
        if self.cfg.eval_mode:
            self._modules = _modules_of(model, set(matched))
        several = args.accelerator.num_processes > 1
        self._drops_gradients = several and not is_sharded_model(model)
        if not self._is_over(args):
            self._freeze()
        left = sum(parameter.requires_grad for parameter in model.parameters())
        if self._frozen and left == (len(self._parameters) if self._drops_gradients else 0):
            logger.warning("%s has frozen all of the model's parameters", self.name)

    def _match(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        """The parameters that a pattern names, by any of their names, where they are tied."""
        named = all_named_parameters(model)
        found: list[torch.nn.Parameter] = []
        for pattern in self.cfg.patterns:
            matched = match_parameters(pattern, named)
            if not matched:
                raise PipelineConfigError(
                    f"{self.name}: patterns has {pattern!r}, which matches no parameter; "
                    f"{suggest_pattern(pattern, named)}"
                )
            found += matched
        return list(dict.fromkeys(found))

    def _look(self, args: PipelineHookArgs) -> None:
        over = self._is_over(args)
        if self._frozen is over:
            if over:
                self._thaw(args)
            else:
                self._freeze()  # the run was set back
        elif self._frozen:
            for module in self._modules:
                if module.training:  # somebody has put the whole model in training mode
                    module.eval()

    def _is_over(self, args: PipelineHookArgs) -> bool:
        return self._until is not None and self._until.reached(args.progress)

    def _freeze(self) -> None:
        self._frozen = True
        self._in_training = [
            part for module in self._modules for part in module.modules() if part.training
        ]
        for module in self._modules:
            module.eval()
        for parameter in self._parameters:
            parameter.grad = None
            if not self._drops_gradients:
                parameter.requires_grad_(False)

    def _drop(self, args: PipelineHookArgs) -> None:
        if self._frozen and self._drops_gradients:
            for parameter in self._parameters:
                parameter.grad = None

    def _thaw(self, args: PipelineHookArgs) -> None:
        if self._frozen:
            self._frozen = False
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            for module in self._in_training:
                module.training = True


class FreezeHookConfig(PipelineHooksConfig[FreezeHook]):
    """What to freeze, and until when.

    >>> FreezeHookConfig(patterns=["encoder.*"], until_step=1000, eval_mode=True)().name
    'FreezeHook'
    """

    class_type: type[FreezeHook] = FreezeHook
    patterns: list[str] = Field(
        min_length=1,
        description="Names of parameters as the plain model has them, with * for any text, "
        "dots included, ? for one character and [ab] for one of some. Each must match.",
    )
    until_step: int | None = Field(
        default=None, ge=1, description="Thaw when so many steps (batches) of the run are done."
    )
    until_optimizer_step: int | None = Field(
        default=None, ge=1, description="Thaw when so many updates are committed."
    )
    until_epoch: int | None = Field(
        default=None, ge=1, description="Thaw when so many epochs are done."
    )
    eval_mode: bool = Field(
        default=False,
        description="Keep modules whose parameters are all frozen in evaluation mode, where "
        "dropout is off and BatchNorm keeps its statistics.",
    )

    def until(self) -> TrainerLimits | None:
        """Where the thaw comes: at whichever limit is reached first; None for never."""
        limits = (self.until_step, self.until_optimizer_step, self.until_epoch)
        return None if limits == (None, None, None) else TrainerLimits(*limits)


def _modules_of(model: torch.nn.Module, matched: set[torch.nn.Parameter]) -> list[torch.nn.Module]:
    """The outermost modules with only frozen parameters, of which one or more are matched."""
    found: list[torch.nn.Module] = []
    inner: set[torch.nn.Module] = set()
    for module in model.modules():  # outer ones come first
        parameters = set(module.parameters())
        frozen = all(p in matched or not p.requires_grad for p in parameters)
        if frozen and parameters & matched and module not in inner:
            found.append(module)
            inner.update(module.modules())
    return found
