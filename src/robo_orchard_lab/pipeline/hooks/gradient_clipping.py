"""Clip the gradients ahead of each update."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.gradient_norm import (
    clip_gradient_values,
    clip_gradients,
    gradient_norm,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig


class GradientClippingHook(PipelineHooks):
    """Clips the gradients by norm or by value, and publishes their norm before clipping.

    It runs on every rank, ahead of the update, on the gradients of the whole accumulation window.
    It publishes ``grad_norm`` as a tensor on the device, which it takes from ``args.grad_norm``
    where another hook has computed it, and else keeps there. Nothing is read from the device.

    Two of them clip one after the other, each by the norm of what the one before has left.
    """

    def __init__(self, cfg: GradientClippingHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_hook("on_optimizer_step", HookContext.from_callable(before=self._clip))

    def _clip(self, args: PipelineHookArgs) -> None:
        cfg = self.cfg
        if cfg.max_norm is not None:
            norm = clip_gradients(args, cfg.max_norm, cfg.norm_type)
        else:
            assert cfg.max_value is not None  # the config has checked that there is one
            norm = gradient_norm(args, cfg.norm_type)
            clip_gradient_values(args, cfg.max_value)
        if norm is not None:  # DeepSpeed clips by itself and may not tell
            args.metrics.publish("grad_norm", norm)


class GradientClippingHookConfig(PipelineHooksConfig[GradientClippingHook]):
    """How to clip: exactly one of ``max_norm`` and ``max_value``.

    >>> GradientClippingHookConfig(max_norm=1.0)().name
    'GradientClippingHook'
    """

    class_type: type[GradientClippingHook] = GradientClippingHook
    max_norm: float | None = Field(
        default=None,
        gt=0,
        description="Scale all gradients so that their joint norm is at most this.",
    )
    max_value: float | None = Field(
        default=None, gt=0, description="Clamp every element to [-max_value, max_value]."
    )
    norm_type: float = Field(
        default=2.0, gt=0, description="The order of the norm that is published and clipped by."
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.max_norm is None) == (self.max_value is None):
            raise ValueError(
                "give exactly one of max_norm and max_value, "
                f"got max_norm={self.max_norm}, max_value={self.max_value}"
            )
        return self
