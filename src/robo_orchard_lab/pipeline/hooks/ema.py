"""Exponential moving average (EMA) of the weights.

`AveragedWeights` holds the average of one model; the hook `EMA` updates it during a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Annotated, Any, Literal, TypeAlias

import torch
from accelerate.utils import DistributedType
from pydantic import Field
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import (
    PipelineConfigError,
    PipelineStateError,
    StateError,
    check_state_version,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.model import copy_all, plain_model, plain_name
from robo_orchard_lab.pipeline.requests import StopRequest
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sharded_tensors import gather_full_tensors, has_sharded, local_tensor
from robo_orchard_lab.pipeline.sharding import reshard, shard_like
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema, Tensors
from robo_orchard_lab.pipeline.trigger import Last

STATE_VERSION = 1

_Group: TypeAlias = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Shadows and their parameters."""

_HALF = (torch.float16, torch.bfloat16)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class AveragedWeights:
    """Moving average of a model's trainable parameters, and copies of its other saved tensors.

    - A floating-point parameter is averaged from its first update on, starting from its value
      before this update. A frozen parameter has no shadow: its average is its value. A tied
      parameter is averaged once.
    - Persistent buffers and non-floating-point parameters are copied, unless configured otherwise.
    - Of a sharded model, each process averages its shards; shadows are sharded like the parameters.

    Args:
        model: the plain model; its ``state_dict`` names the tensors.
        dtype: of the shadows; by default the dtype of each parameter, and float32 for half
            precision, which would lose small updates.
        use_buffers: average floating-point buffers, too, in their own dtypes.
        copy_batch_norm: copy the parameters of batch normalization instead of averaging them.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        *,
        use_buffers: bool = False,
        copy_batch_norm: bool = False,
    ) -> None:
        self.model = model
        self._dtype = dtype
        norms = [m for m in model.modules() if copy_batch_norm and isinstance(m, _BATCH_NORMS)]
        copied = {id(parameter) for norm in norms for parameter in norm.parameters()}
        self._parameters = {
            plain_name(name): parameter
            for name, parameter in model.named_parameters()
            if id(parameter) not in copied
            and (parameter.is_floating_point() or parameter.is_complex())
        }
        self._frozen = dict(self._parameters)
        self._shadows: dict[str, torch.Tensor] = {}
        self._groups: list[_Group] = []
        averaged = {id(parameter) for parameter in self._parameters.values()}
        self._copied = dict(_copied_tensors(model, averaged))
        self._copies = [tensor.detach().clone() for tensor in self._originals()]
        self._averaged_buffers = {
            plain_name(name)
            for name, buffer in model.named_buffers()
            if use_buffers and (buffer.is_floating_point() or buffer.is_complex())
        }
        self._is_sharded = has_sharded(model.parameters())
        self._is_applied = False

    def add_trainable(self) -> None:
        """Start averaging parameters that became trainable; call before each update."""
        thawed = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        if thawed:
            for name in thawed:
                parameter = self._frozen.pop(name)
                self._shadows[name] = self._make_shadow(parameter, parameter)
            self._group()

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Set ``shadow = decay * shadow + (1 - decay) * parameter``, without a device sync.

        Raises:
            PipelineStateError: the average is applied to the model.
        """
        self._refuse_if_applied("an update of the weights")
        for shadows, parameters in self._groups:
            if self._is_sharded:
                shadows = [*map(local_tensor, shadows)]
                parameters = [*map(local_tensor, parameters)]
            if decay == 0.0:  # a copy also removes non-finite values from the average
                copy_all(shadows, parameters)
                continue
            if shadows[0].dtype != parameters[0].dtype:
                converted = [torch.empty_like(shadow) for shadow in shadows]
                copy_all(converted, parameters)
                parameters = converted
            # Interpolates: in float32, 0.9999 and 1 - 0.9999 don't add up to 1, so with mul and add
            # the average of a constant would be off by a factor of 2e-4.
            get_ema_multi_avg_fn(decay)(shadows, parameters, None)
        if self._copies:
            copies, originals = self._copies, self._originals()
            if self._averaged_buffers and decay != 0.0:
                originals = [
                    torch.lerp(copy, tensor.to(copy), 1.0 - decay)
                    if name in self._averaged_buffers
                    else tensor
                    for name, copy, tensor in zip(self._copied, copies, originals, strict=True)
                ]
            if self._is_sharded:
                copies, originals = [*map(local_tensor, copies)], [*map(local_tensor, originals)]
            copy_all(copies, originals)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the body; restore its own tensors bit for bit.

        Changes made by the body are lost.

        Raises:
            PipelineStateError: the average is applied already.
        """
        # Tensors are copied and written in place, because graphs and wrappers refer to them.
        self._refuse_if_applied("applying it again")
        reshard(self.model)
        originals = self._originals()
        tensors = [*(self._parameters[name] for name in self._shadows), *originals]
        own = [tensor.detach().clone() for tensor in tensors]
        self._is_applied = True
        try:
            _copy(tensors, [*self._shadows.values(), *self._copies])
            yield
        finally:
            reshard(self.model)
            for (owner, key), tensor in zip(self._copied.values(), originals, strict=True):
                setattr(owner, key, tensor)  # the body may have replaced the tensor
            _copy(tensors, own)
            self._is_applied = False

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the model's ``state_dict`` with the average applied, as copies on the CPU.

        Needs memory for a copy of the model on its device, and a device sync. A collective if the
        model is sharded.
        """
        with self.applied():
            state = self.model.state_dict()
            tensors = {n: value for n, value in state.items() if isinstance(value, torch.Tensor)}
            return {plain_name(n): v for n, v in gather_full_tensors(tensors, keep=True).items()}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the shadows and the copies by name, not cloned."""
        self._refuse_if_applied("saving")  # the average would be saved as the model
        return {
            "shadows": dict(self._shadows),
            "copies": dict(zip(self._copied, self._copies, strict=True)),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restore a state from copies; a sharded model takes its shards of full tensors.

        Raises:
            StateError: the state belongs to another model; nothing is changed then.
        """
        self.check(state)
        shadows, copies = state["shadows"], state["copies"]
        originals = dict(zip(self._copied, self._originals(), strict=True))
        self._shadows = {
            name: self._make_shadow(self._parameters[name], value)
            for name, value in shadows.items()
        }
        self._frozen = {n: p for n, p in self._parameters.items() if n not in shadows}
        self._copies = [
            torch.empty_like(t).copy_(shard_like(t, copies[n])) for n, t in originals.items()
        ]
        self._group()

    def check(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Raise a ``StateError`` if the state belongs to another model."""
        shadows, copies = state.get("shadows", {}), state.get("copies", {})
        originals = dict(zip(self._copied, self._originals(), strict=True))
        problems = [f"unexpected: {name}" for name in shadows if name not in self._parameters]
        problems += [f"unexpected: {name}" for name in copies if name not in originals]
        problems += [f"missing: {name}" for name in originals if name not in copies]
        problems += [
            f"{name}: saved as {tuple(saved.shape)}, here {tuple(live.shape)}"
            for name, saved in chain(shadows.items(), copies.items())
            if (live := self._parameters.get(name, originals.get(name))) is not None
            and (live.shape, live.is_complex()) != (saved.shape, saved.is_complex())
        ]
        if problems:
            raise StateError("the saved average belongs to another model: " + "; ".join(problems))

    def _refuse_if_applied(self, action: str) -> None:
        if self._is_applied:
            raise PipelineStateError(
                f"the averaged weights are applied to the model, which rules out {action}; "
                "exit `with ema.applied():` first"
            )

    def _originals(self) -> list[torch.Tensor]:
        """Look up the copied tensors again: modules may have replaced a buffer."""
        return [getattr(owner, key) for owner, key in self._copied.values()]

    def _make_shadow(self, parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        dtype = parameter.dtype
        if self._dtype is not None and not parameter.is_complex():
            dtype = self._dtype
        elif dtype in _HALF:
            dtype = torch.float32
        shadow = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return shadow.copy_(shard_like(parameter, value.detach()))

    def _group(self) -> None:
        """Group tensors by dtype and device, so that one kernel launch updates many."""
        groups: dict[Any, _Group] = {}
        for name, shadow in self._shadows.items():
            parameter = self._parameters[name]
            key = (shadow.dtype, parameter.dtype, parameter.device)
            shadows, parameters = groups.setdefault(key, ([], []))
            shadows.append(shadow)
            parameters.append(parameter)
        self._groups = list(groups.values())


def averaged_weights(state: Any) -> dict[str, torch.Tensor]:
    """Return the averages in a saved state of an `EMA` by the model's names; empty for others."""
    found: dict[str, torch.Tensor] = {}
    for part in ("shadows", "copies") if isinstance(state, Mapping) else ():
        found |= state.get(part) or {}
    return found


def _copied_tensors(
    model: nn.Module, averaged: set[int]
) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Yield the name and location of each saved, not averaged tensor; tied tensors once."""
    saved = {id(value) for value in model.state_dict(keep_vars=True).values()}
    seen = set(averaged)
    for path, module in model.named_modules():
        own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for key, tensor in chain(*own):
            if id(tensor) in saved and id(tensor) not in seen:
                seen.add(id(tensor))
                yield plain_name(f"{path}.{key}" if path else key), (module, key)


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


class EMA(PipelineHooks):
    """Exponential moving average of the weights, updated after each committed update.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> processor = SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(batch)))
    >>> ema = EMAConfig(decay=0.75)()
    >>> HookBasedTrainer(  # each update subtracts 1 from the weight
    ...     Accelerator(cpu=True), model, [torch.ones(1)] * 2, processor,
    ...     torch.optim.SGD(model.parameters(), lr=1.0), hooks=[ema], max_epoch=1,
    ... )()
    >>> with ema.applied():
    ...     print(model.weight.item())  # 0.75 * (0.75 * 0 + 0.25 * -1) + 0.25 * -2
    -0.6875
    >>> model.weight.item()
    -2.0

    Trainable parameters are averaged; persistent buffers and integers are copied at the same
    updates; frozen parameters keep their values. A skipped update changes nothing. Training is bit
    for bit the same without the hook. Other hooks evaluate or save the average by the hook's name.

    With several optimizers, the weights are averaged once for each step with a committed update, or
    after the updates of one ``optimizer`` only.

    - Ranks: all, without a collective. Buffers are those of each rank, and the main process writes
      its own. Of a sharded model (FSDP2), each rank averages its shards.
    - Requests: with ``export_path``, writing the average at the end of the run.
    - State: the numbers of updates, the averages and the copied tensors.
    - Cost: one pass over the weights per averaging, without a device sync. Device memory for the
      trainable parameters, twice as much while applied.
    """

    reads = ("model.weights", "model.buffers", "update_committed")
    changes = ()
    requests = ()

    def __init__(self, cfg: EMAConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.export_path is not None:
            self.declare_effects(requests=["save_weights"])
        self._updates = 0
        self._updates_in_epoch = 0
        self._averagings = 0  # after update_after_step
        self._average: AveragedWeights | None = None
        self._loaded: Mapping[str, Any] | None = None  # until the average is needed
        self._checked_model: nn.Module | None = None  # of the trainer that loads a state
        self._is_running = False
        self._stops: RemovableHandle | None = None
        self._has_exported = False
        self.register_hook("on_loop", HookContext.from_callable(self._begin, self._end))
        self.on_optimizer_step.before(self._before_update)
        self.on_optimizer_step.after(self._after_update)
        self.on_epoch.after(self._end_epoch)
        if cfg.export_path is not None:
            self.register_at_commit(self._export, Last())

    def applied(self) -> AbstractContextManager[None]:
        """Put the average into the model for the body, see :meth:`AveragedWeights.applied`.

        Raises:
            PipelineStateError: no run has begun or was resumed yet, or the average is applied
                already.
        """
        return self._require_average().applied()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the average with the model's names and dtypes: CPU copies, after a device sync.

        A collective if the model is sharded.

        Raises:
            PipelineStateError: no run has begun or was resumed yet.
        """
        return self._require_average().weights()

    def _begin(self, args: PipelineHookArgs) -> None:
        model = plain_model(args.run)
        if self._average is None or self._average.model is not model:
            accelerator = args.accelerator
            if accelerator.distributed_type is DistributedType.FSDP and not accelerator.is_fsdp2:
                raise PipelineConfigError(
                    f"{self.name} averages parameters by name, but FSDP1 flattens parameters; use "
                    "FullyShardedDataParallelPlugin(fsdp_version=2)"
                )
            if self._average is not None:
                # The average was of another trainer's model.
                self._updates = self._updates_in_epoch = self._averagings = 0
            self._average = self._make_average(model)
        if self._loaded is not None:
            self._average.load_state_dict(self._loaded)
            self._loaded = None
        args.run.weight_sets[self.name] = self
        if self.cfg.optimizer is not None:
            args.run.check_optimizer(self.cfg.optimizer, self.name, "optimizer")
        elif args.run.optimizer_names:
            args.run.after_updates[self.name] = self._after_all_updates
        self._is_running = True
        self._has_exported = False
        if self.cfg.export_path is not None:
            self._stops = args.requests.listen(
                lambda request: self._export(args) if isinstance(request, StopRequest) else None
            )

    def _end(self, args: PipelineHookArgs) -> None:
        self._is_running = False
        args.run.weight_sets.pop(self.name, None)
        args.run.after_updates.pop(self.name, None)
        if self._stops is not None:
            self._stops.remove()

    def _make_average(self, model: nn.Module) -> AveragedWeights:
        cfg = self.cfg
        return AveragedWeights(
            model,
            cfg.shadow_dtype and getattr(torch, cfg.shadow_dtype),
            use_buffers=cfg.use_buffers,
            copy_batch_norm=cfg.copy_batch_norm,
        )

    def _before_update(self, args: PipelineHookArgs) -> None:
        assert self._average is not None  # set when on_loop began
        self._average.add_trainable()

    def _after_update(self, args: PipelineHookArgs) -> None:
        if args.update_committed and args.optimizer_name == self.cfg.optimizer:
            self._add_weights()

    def _after_all_updates(self, committed: bool) -> None:
        if committed:
            self._add_weights()

    def _add_weights(self) -> None:
        assert self._average is not None
        cfg = self.cfg
        self._updates += 1
        if self._updates_in_epoch % cfg.update_every == 0:
            is_copied = cfg.copy_first and self._averagings == 0
            self._average.update(0.0 if is_copied else cfg.decay_of(self._updates))
            self._averagings += self._updates > cfg.update_after_step
        self._updates_in_epoch += 1

    def _end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed:
            self._updates_in_epoch = 0

    def _export(self, args: PipelineHookArgs) -> None:
        assert self.cfg.export_path is not None
        if not self._has_exported:
            self._has_exported = True
            args.requests.save_weights(
                self.cfg.export_path, "the run ends", self.name, weights=self.name
            )

    def _require_average(self) -> AveragedWeights:
        if self._average is None and self._loaded is not None and self._checked_model is not None:
            average = self._make_average(self._checked_model)
            average.load_state_dict(self._loaded)
            self._average, self._loaded = average, None
        if self._average is None:
            raise PipelineStateError(
                f"{self.name} has no average yet: register the hook in a trainer and run it first, "
                "or resume a run with an average"
            )
        return self._average

    state_schema = StateSchema(
        STATE_VERSION,
        optional=["shadows", "copies", "updates_in_epoch", "averagings"],
        updates=Count,
        shadows=Tensors,
        copies=Tensors,
        updates_in_epoch=Count,
        averagings=Count,
    )

    def check_state(self, state: Any, model: torch.nn.Module) -> None:
        super().check_state(state, model)
        if {"shadows", "copies"} & state.keys():
            self._make_average(model).check(state)
        self._checked_model = model  # a completed run that is resumed doesn't begin its loop

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of updates and the tensors, not cloned."""
        average = self._loaded or (self._average.state_dict() if self._average else {})
        state = {"version": STATE_VERSION, "updates": self._updates, **average}
        if self._updates:
            state["updates_in_epoch"] = self._updates_in_epoch
            state["averagings"] = self._averagings
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state: at once during a run, otherwise when the average is needed.

        Raises:
            StateError: another version, or the average of another model.
        """
        check_state_version(state, STATE_VERSION, self.name)
        average = {part: dict(state[part]) for part in ("shadows", "copies") if part in state}
        if not self._is_running:
            self._average, self._loaded = None, average or None
        elif average:
            self._require_average().load_state_dict(average)
        else:  # saved before its first run
            self._average = self._make_average(self._require_average().model)
        self._updates = state["updates"]
        self._updates_in_epoch = state.get("updates_in_epoch", 0)
        self._averagings = state.get("averagings", 0)


class EMAConfig(PipelineHooksConfig[EMA]):
    """Decay of the average: a constant ``decay``, or a warm-up.

    The warm-up is the one used for diffusion policies. With t the number of committed updates
    before this one, not counting the first ``update_after_step``::

        decay = clamp(1 - (1 + t / inv_gamma) ** -power, min_decay, max_decay)

    Source: K. Crowson's EMAWarmup (github.com/crowsonkb/k-diffusion). With ``inv_gamma`` and
    ``power`` 1 the average is the plain mean of the weights after each update.

    docs/how_to/hooks.md has the settings of other projects' averages.

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
        description="Constant decay: share of the old average kept by each committed update; "
        "None for the warm-up.",
    )
    update_after_step: int = Field(
        default=0,
        ge=0,
        description="Committed updates before averaging starts; until then each averaging copies "
        "the weights.",
    )
    update_every: int = Field(
        default=1,
        ge=1,
        description="Committed updates between two averagings, from the first update of each "
        "epoch on: 32 averages after the updates 1, 33, 65 of an epoch.",
    )
    copy_first: bool = Field(
        default=False,
        description="Copy the weights at the first averaging after update_after_step, too.",
    )
    use_buffers: bool = Field(
        default=False,
        description="Average floating-point buffers, too, such as the running statistics of "
        "batch normalization; otherwise copy them.",
    )
    copy_batch_norm: bool = Field(
        default=False,
        description="Copy the parameters of batch normalization instead of averaging them.",
    )
    inv_gamma: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Warm-up: time scale in committed updates; larger values slow it down.",
    )
    power: float = Field(
        default=0.75,
        gt=0,
        allow_inf_nan=False,
        description="Warm-up: exponent; 3/4 reaches a decay of 0.999 in 10,000 updates, 2/3 in "
        "31,600.",
    )
    min_decay: float = Field(default=0.0, ge=0, lt=1, description="Warm-up: lowest decay.")
    max_decay: float = Field(default=0.9999, ge=0, le=1, description="Warm-up: highest decay.")
    shadow_dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = Field(
        default=None,
        description="dtype of the average; None for the dtype of each parameter, and float32 for "
        "half precision.",
    )
    optimizer: str | None = Field(
        default=None,
        description="With several optimizers: name of the optimizer whose committed updates count; "
        "None counts the steps with any committed update.",
    )
    export_path: Annotated[str | None, RunPath()] = Field(
        default=None,
        description="Safetensors file for the average at the end of the run; overwritten.",
    )

    def __post_init__(self) -> None:
        if self.min_decay > self.max_decay:
            raise ValueError(
                f"min_decay must be <= max_decay, got {self.min_decay} and {self.max_decay}"
            )
        unused = [
            name
            for name in ("inv_gamma", "power", "min_decay", "max_decay")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.decay is not None and unused:
            raise ValueError(
                f"decay={self.decay} replaces the warm-up, got also {', '.join(unused)}; set "
                "either decay or the warm-up"
            )

    def decay_of(self, update: int) -> float:
        """Return the decay of a committed update, counted from 1."""
        before = update - 1 - self.update_after_step
        if before < 0:
            return 0.0
        if self.decay is not None:
            return self.decay
        warmed_up: float = 1.0 - (1.0 + before / self.inv_gamma) ** -self.power
        return min(max(warmed_up, self.min_decay), self.max_decay)
