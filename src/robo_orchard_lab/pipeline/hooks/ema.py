"""Keep a moving average of the weights, to evaluate and to save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Annotated, Any, Literal, TypeAlias

import torch
from accelerate.utils import DistributedType
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import (
    PipelineConfigError,
    PipelineStateError,
    StateError,
    check_state_version,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.model import plain_model, plain_name
from robo_orchard_lab.pipeline.requests import StopRequest
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sharded_tensors import gather_full_tensors, has_sharded, local_tensor
from robo_orchard_lab.pipeline.sharding import reshard, shard_like
from robo_orchard_lab.pipeline.trigger import Last

# --- averaged weights ------------------------------------------------------------------------
# A moving average of a model's weights, beside the model.


_Group: TypeAlias = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Shadows and their parameters."""

_HALF = (torch.float16, torch.bfloat16)


class AveragedWeights:
    """The average of what is trained in a model, and its buffers as they were at the last move.

    - A floating parameter is averaged from the first update in which it is trainable, starting
      with its value ahead of that update. One that is frozen has no shadow: its average is what it
      is. A tied parameter is one parameter.
    - Persistent buffers, and parameters that are no floating numbers, are copied.

    Of a sharded model each process averages its shards, and the shadows are sharded as it is.

    Args:
        model: the plain model; its tensors' names are those of its ``state_dict``.
        dtype: of the shadows, which lie where the parameters do; by default that of each
            parameter, and float32 for one in half precision, where small moves would be lost.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self._dtype = dtype
        self._parameters = {
            plain_name(name): parameter
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() or parameter.is_complex()
        }
        self._frozen = dict(self._parameters)
        self._shadows: dict[str, torch.Tensor] = {}
        self._groups: list[_Group] = []
        self._places = dict(_places(model, {id(p) for p in self._parameters.values()}))
        self._copies = [tensor.detach().clone() for tensor in self._others()]
        self._sharded = has_sharded(self._parameters.values())
        self._in_model = False

    def follow(self) -> None:
        """Ahead of an update: take up what is trainable now and was not."""
        thawed = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        if thawed:
            for name in thawed:
                parameter = self._frozen.pop(name)
                self._shadows[name] = self._shadow(parameter, parameter)
            self._group()

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """After an update: ``shadow = decay * shadow + (1 - decay) * parameter``.

        Nothing is read from the device.

        Raises:
            PipelineStateError: the average itself is in the model.
        """
        self.refuse_in_model("an update of the weights")
        for shadows, parameters in self._groups:
            if self._sharded:  # each process averages what it has
                shadows, parameters = (
                    [*map(local_tensor, shadows)],
                    [*map(local_tensor, parameters)],
                )
            if decay == 0.0:  # also rids the average of what is not finite
                torch._foreach_copy_(shadows, parameters)
                continue
            if shadows[0].dtype != parameters[0].dtype:
                converted = [torch.empty_like(shadow) for shadow in shadows]
                torch._foreach_copy_(converted, parameters)
                parameters = converted
            # Not mul and add: in float32, 0.9999 and 1 - 0.9999 add up to something else than 1,
            # and the average of a constant would be off by 2e-4 of it.
            torch._foreach_lerp_(shadows, parameters, 1.0 - decay)
        if self._copies:
            torch._foreach_copy_(self._copies, self._others())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the average in it; its own tensors come back bit for bit.

        They are kept in a copy meanwhile, and written in place, where graphs and wrappers know
        them to be. What the body changes in them is lost.

        Raises:
            PipelineStateError: the average is in the model already.
        """
        self.refuse_in_model("applying it again")
        reshard(self.model)
        others = self._others()
        tensors = [*(self._parameters[name] for name in self._shadows), *others]
        own = [tensor.detach().clone() for tensor in tensors]
        self._in_model = True
        try:
            _copy(tensors, [*self._shadows.values(), *self._copies])
            yield
        finally:
            reshard(self.model)
            for (owner, key), tensor in zip(self._places.values(), others, strict=True):
                owner[key] = tensor  # the body may have put another one there
            _copy(tensors, own)
            self._in_model = False

    def weights(self) -> dict[str, torch.Tensor]:
        """What the model's ``state_dict`` holds with the average in it: copies, on the CPU.

        Takes the memory of a copy of the model on its device, and waits for it. A collective where
        the model is sharded.
        """
        with self.applied():
            state = self.model.state_dict()
            tensors = {n: value for n, value in state.items() if isinstance(value, torch.Tensor)}
            return {plain_name(n): v for n, v in gather_full_tensors(tensors, keep=True).items()}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """The shadows and the copies by name, not copied."""
        self.refuse_in_model("saving")  # what is saved as the model would be the average
        return {
            "shadows": dict(self._shadows),
            "copies": dict(zip(self._places, self._copies, strict=True)),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take over a state, in copies; where it is whole and the model sharded, a share of it.

        Raises:
            StateError: it is that of another model; nothing is changed then.
        """
        shadows, copies = state["shadows"], state["copies"]
        others = dict(zip(self._places, self._others(), strict=True))
        problems = [f"unexpected: {name}" for name in shadows if name not in self._parameters]
        problems += [f"unexpected: {name}" for name in copies if name not in others]
        problems += [f"missing: {name}" for name in others if name not in copies]
        problems += [
            f"{name}: saved as {tuple(saved.shape)}, here {tuple(live.shape)}"
            for name, saved in chain(shadows.items(), copies.items())
            if (live := self._parameters.get(name, others.get(name))) is not None
            and live.shape != saved.shape
        ]
        if problems:
            raise StateError("the saved average is that of another model: " + "; ".join(problems))
        self._shadows = {
            name: self._shadow(self._parameters[name], value) for name, value in shadows.items()
        }
        self._frozen = {n: p for n, p in self._parameters.items() if n not in shadows}
        self._copies = [
            torch.empty_like(t).copy_(shard_like(t, copies[name])) for name, t in others.items()
        ]
        self._group()

    def refuse_in_model(self, what: str) -> None:
        """Refuse what makes no sense while the average is in the model."""
        if self._in_model:
            raise PipelineStateError(
                f"the averaged weights are in the model, which rules out {what}; "
                "leave `with ema.applied():` first"
            )

    def _others(self) -> list[torch.Tensor]:
        """What is copied, looked up anew: modules may put another tensor in a buffer's place."""
        return [owner[key] for owner, key in self._places.values()]

    def _shadow(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        dtype = parameter.dtype
        if self._dtype is not None and not parameter.is_complex():
            dtype = self._dtype
        elif dtype in _HALF:
            dtype = torch.float32
        shadow = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return shadow.copy_(shard_like(parameter, value.detach()))

    def _group(self) -> None:
        """Lists of tensors that are alike, which the device handles in few launches."""
        groups: dict[Any, _Group] = {}
        for name, shadow in self._shadows.items():
            parameter = self._parameters[name]
            key = (shadow.dtype, parameter.dtype, parameter.device)
            shadows, parameters = groups.setdefault(key, ([], []))
            shadows.append(shadow)
            parameters.append(parameter)
        self._groups = list(groups.values())


def _places(
    model: torch.nn.Module, averaged: set[int]
) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    """Where the model keeps the saved tensors that are not averaged, by name; tied ones once."""
    saved = {id(value) for value in model.state_dict(keep_vars=True).values()}
    seen = set(averaged)
    for path, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None and id(tensor) in saved and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield plain_name(f"{path}.{key}" if path else key), (owner, key)


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


STATE_VERSION = 1


class EMA(PipelineHooks):
    """The exponential moving average of the weights, moved with each committed update.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> processor = SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(batch)))
    >>> ema = EMAConfig(decay=0.75)()
    >>> HookBasedTrainer(  # each update takes 1 from the weight
    ...     Accelerator(cpu=True), model, [torch.ones(1)] * 2, processor,
    ...     torch.optim.SGD(model.parameters(), lr=1.0), hooks=[ema], max_epoch=1,
    ... )()
    >>> with ema.applied():
    ...     print(model.weight.item())  # 0.75 * (0.75 * 0 + 0.25 * -1) + 0.25 * -2
    -0.6875
    >>> model.weight.item()
    -2.0

    What is trained is averaged; buffers (those that a ``state_dict`` has) and whole numbers are
    copied with each committed update; what is frozen is what it is. A skipped update moves nothing,
    and the training is bit for bit what it would be without.

    It runs on every rank, with no exchange and nothing read from the device. The averages of the
    ranks are equal, since their weights are; buffers are those of each rank, and the first rank's
    are written. Of a sharded model (FSDP2) each rank averages its shards. It takes one pass over
    the weights for each update, and as much memory on the device as what is trained; while it is
    applied, as much again.

    A hook that evaluates or saves finds it by its name, in ``args.run.weight_sets``. When the run
    is over, it can still be applied.
    """

    def __init__(self, cfg: EMAConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._dtype: torch.dtype | None = cfg.shadow_dtype and getattr(torch, cfg.shadow_dtype)
        self._updates = 0
        self._average: AveragedWeights | None = None
        self._loaded: Mapping[str, Any] | None = None  # until there is a model to load it for
        self._running = False
        self._stops: RemovableHandle | None = None
        self._exported = False
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._begin, after=self._end)
        )
        self.register_hook(
            "on_optimizer_step", HookContext.from_callable(before=self._follow, after=self._move)
        )
        if cfg.export_path is not None:
            self.register_at_commit(self._export, Last())

    def applied(self) -> AbstractContextManager[None]:
        """The model with the average in it, for the body of a ``with``.

        Afterwards, also when the body raises, the model's own weights and buffers are back bit for
        bit, whatever the body did to them.

        Raises:
            PipelineStateError: no run has begun yet, or the average is in the model already.
        """
        return self._begun().applied()

    def weights(self) -> dict[str, torch.Tensor]:
        """The average by the names of the plain model's ``state_dict``: copies, on the CPU.

        They have the model's data types, so that they are what :meth:`applied` evaluates. Waits for
        the device; a collective where the model is sharded.

        Raises:
            PipelineStateError: no run has begun yet.
        """
        return self._begun().weights()

    def _begin(self, args: PipelineHookArgs) -> None:
        model = plain_model(args.run)
        if self._average is None or self._average.model is not model:
            _refuse_flat(self.name, args)
            if self._average is not None:
                self._updates = 0  # the average was that of another trainer's model
            self._average = AveragedWeights(model, self._dtype)
        if self._loaded is not None:
            self._average.load_state_dict(self._loaded)
            self._loaded = None
        args.run.weight_sets[self.name] = self
        self._running = True
        self._exported = False
        if self.cfg.export_path is not None:
            self._stops = args.requests.listen(
                lambda request: self._export(args) if isinstance(request, StopRequest) else None
            )

    def _end(self, args: PipelineHookArgs) -> None:
        self._running = False
        args.run.weight_sets.pop(self.name, None)
        if self._stops is not None:
            self._stops.remove()

    def _follow(self, args: PipelineHookArgs) -> None:
        assert self._average is not None  # on_loop is around this
        self._average.follow()

    def _move(self, args: PipelineHookArgs) -> None:
        if args.update_committed:
            assert self._average is not None
            self._average.move(self.cfg.decay_of(self._updates + 1))
            self._updates += 1

    def _export(self, args: PipelineHookArgs) -> None:
        """The run ends at the commit point that is next."""
        assert self.cfg.export_path is not None
        if not self._exported:
            self._exported = True
            args.requests.save_weights(
                self.cfg.export_path, "the run ends", self.name, weights=self.name
            )

    def _begun(self) -> AveragedWeights:
        if self._average is None:
            raise PipelineStateError(
                f"{self.name} has no average yet: it begins with the run of a trainer that it is "
                "registered in"
            )
        return self._average

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the tensors, not copied.

        Raises:
            PipelineStateError: the average is in the model, where it would be saved as the model.
        """
        if self._loaded is not None:
            average = self._loaded
        else:
            average = self._average.state_dict() if self._average else {}
        return {"version": STATE_VERSION, "updates": self._updates, **average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state: at once while there is a run, else when it begins.

        Raises:
            StateError: another version, or the average of another model.
        """
        check_state_version(state, STATE_VERSION, self.name)
        average = {part: dict(state[part]) for part in ("shadows", "copies") if part in state}
        if not self._running:
            self._average, self._loaded = None, average or None
        elif average:
            self._begun().load_state_dict(average)
        else:  # saved ahead of its first run
            self._average = AveragedWeights(self._begun().model, self._dtype)
        self._updates = state["updates"]


class EMAConfig(PipelineHooksConfig[EMA]):
    """How fast the average follows: by a constant ``decay``, or by the warm-up schedule.

    The warm-up schedule is that of diffusion policies: with t the committed updates before this
    one, not counting the first ``update_after_step``,

        decay = clamp(1 - (1 + t / inv_gamma) ** -power, min_decay, max_decay)

    Source: K. Crowson's EMAWarmup (github.com/crowsonkb/k-diffusion), as in Hugging Face's
    diffusers and LeRobot. The EMAModel of github.com/real-stanford/diffusion_policy is one update
    behind: its t does not count the first of these either. With ``inv_gamma`` and ``power`` 1 it
    is the plain mean of the weights after each update.

    >>> [round(EMAConfig(power=0.75).decay_of(update), 4) for update in (1, 2, 10_000)]
    [0.0, 0.4054, 0.999]
    >>> EMAConfig(decay=0.9999)().name
    'EMA'
    """

    class_type: type[EMA] = EMA
    decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="The part of the average that stays with each committed update; None for the "
        "warm-up schedule.",
    )
    update_after_step: int = Field(
        default=0,
        ge=0,
        description="In committed updates: so long the average is just the weights.",
    )
    inv_gamma: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Stretches the warm-up schedule, in committed updates.",
    )
    power: float = Field(
        default=0.75,
        gt=0,
        allow_inf_nan=False,
        description="How fast the warm-up schedule rises: with 3/4 to 0.999 in 10,000 updates, "
        "with 2/3 in 31,600.",
    )
    min_decay: float = Field(
        default=0.0, ge=0, lt=1, description="The least decay when warming up."
    )
    max_decay: float = Field(
        default=0.9999, ge=0, le=1, description="The highest decay of the warm-up schedule."
    )
    shadow_dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = Field(
        default=None,
        description="The data type to average in; None for that of each parameter, and float32 "
        "for those in half precision.",
    )
    export_path: Annotated[str | None, RunPath()] = Field(
        default=None,
        description="Where to write the average at the end of the run: a safetensors file, which "
        "is replaced.",
    )

    def __post_init__(self) -> None:
        if self.min_decay > self.max_decay:
            raise ValueError(
                f"min_decay must be <= max_decay, got {self.min_decay} and {self.max_decay}"
            )
        idle = [
            name
            for name in ("inv_gamma", "power", "min_decay", "max_decay")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.decay is not None and idle:
            raise ValueError(
                f"{', '.join(idle)} would shape the warm-up schedule, which decay={self.decay} "
                "replaces; give one or the other"
            )

    def decay_of(self, update: int) -> float:
        """The decay of one committed update, the first being number 1."""
        before = update - 1 - self.update_after_step
        if before < 0:
            return 0.0
        if self.decay is not None:
            return self.decay
        warmed: float = 1.0 - (1.0 + before / self.inv_gamma) ** -self.power
        return min(max(warmed, self.min_decay), self.max_decay)


def _refuse_flat(name: str, args: PipelineHookArgs) -> None:
    accelerator = args.accelerator
    if accelerator.distributed_type is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise PipelineConfigError(
            f"{name} averages parameters by name, and FSDP's first version has put those of this "
            "model together in flat ones; use FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
