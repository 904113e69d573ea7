"""Hook that clips the gradients before each update."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.gradient_norm import (
    clip_gradient_values,
    clip_gradients,
    gradient_norm,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig, for_optimizers


class GradientClippingHook(PipelineHooks):
    """Gradient clipping by norm or by value before each update.

    Two of these hooks clip in turn; the second measures the norm after the first.

    - Ranks: all, on the accumulated gradients.
    - Publishes: ``grad_norm``, the norm before clipping, as a device tensor; with several
      optimizers ``grad_norm/<optimizer>``. Shares the norm with other hooks in ``args.grad_norm``.
    - State: none.
    - Cost: one norm per update, no device sync.
    """

    published_metrics = ("grad_norm", "grad_norm/*")
    reads = ("gradients", "grad_norm")
    changes = ("gradients", "grad_norm", "metrics")
    requests = ()

    def __init__(self, cfg: GradientClippingHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.on_optimizer_step.before(for_optimizers(cfg.optimizers, self._clip))
        if cfg.optimizers is not None:
            self.on_loop.before(self._check_names)

    def _check_names(self, args: PipelineHookArgs) -> None:
        for index, name in enumerate(self.cfg.optimizers or ()):
            args.run.check_optimizer(name, self.name, "optimizers", index)

    def _clip(self, args: PipelineHookArgs) -> None:
        cfg = self.cfg
        if cfg.max_norm is not None:
            norm = clip_gradients(args, cfg.max_norm, cfg.norm_type)
        else:
            assert cfg.max_value is not None  # checked by the config
            norm = gradient_norm(args, cfg.norm_type)
            clip_gradient_values(args, cfg.max_value)
        if norm is not None:  # DeepSpeed clips itself and may not report the norm
            args.metrics.publish(args.metric_name("grad_norm"), norm)


class GradientClippingHookConfig(PipelineHooksConfig[GradientClippingHook]):
    """Bound of the gradients: exactly one of ``max_norm`` and ``max_value``.

    >>> GradientClippingHookConfig(max_norm=1.0)().name
    'GradientClippingHook'
    """

    class_type: type[GradientClippingHook] = GradientClippingHook
    max_norm: float | None = Field(
        default=None,
        gt=0,
        description="Scale all gradients so that their total norm is at most this.",
    )
    max_value: float | None = Field(
        default=None, gt=0, description="Clamp every element to [-max_value, max_value]."
    )
    norm_type: float = Field(
        default=2.0, gt=0, description="Order of the norm to publish and to clip by."
    )

    optimizers: list[str] | None = Field(
        default=None,
        min_length=1,
        description="With several optimizers, the names of those whose gradients to clip, each by "
        "its own norm; None clips all.",
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.max_norm is None) == (self.max_value is None):
            raise ValueError(
                "expected exactly one of max_norm and max_value, "
                f"got max_norm={self.max_norm}, max_value={self.max_value}"
            )
        return self
