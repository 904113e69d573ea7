"""A moving average of a model's weights, beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch

from robo_orchard_lab.pipeline.errors import PipelineStateError, StateError
from robo_orchard_lab.pipeline.model import plain_name
from robo_orchard_lab.pipeline.sharded_tensors import gather_whole, has_sharded, local_part
from robo_orchard_lab.pipeline.sharding import reshard, share_like

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
                shadows, parameters = [*map(local_part, shadows)], [*map(local_part, parameters)]
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
            return {plain_name(n): v for n, v in gather_whole(tensors, keep=True).items()}

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
            torch.empty_like(t).copy_(share_like(t, copies[name])) for name, t in others.items()
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
        return shadow.copy_(share_like(parameter, value.detach()))

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
