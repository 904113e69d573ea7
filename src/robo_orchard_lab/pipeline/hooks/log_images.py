"""Hook that reports images of the batch or of the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.pixels import MediaError
from robo_orchard_lab.pipeline.trigger import TriggerField


class LogImages(PipelineHooks):
    """Images of a step's batch or outputs, reported as one grid.

    The run folder gets them, and so does every tracker of the ``MetricsLogger`` that shows images.

    - Ranks: the main process reports its own images.
    - State: none.
    - Cost: where due, a copy of the shown images to the host, which waits for the device, and their
      encoding: about 15 ms for 16 images of 64 x 64 pixels.

    >>> LogImagesConfig(every="500 steps", key="image")().name
    'LogImages'
    """

    keeps_trajectory = True
    published_metrics = ()

    def __init__(self, cfg: LogImagesConfig) -> None:
        super().__init__()
        self.cfg = cfg
        hook = HookContext.from_callable(after=self._report)
        self.register_hook("on_step", hook, when=cfg.every)

    def _report(self, args: PipelineHookArgs) -> None:
        cfg = self.cfg
        if args.exception is not None or args.is_padding_step or not args.report.is_wanted:
            return
        try:
            found = args.batch if cfg.source == "batch" else args.model_outputs
            images = self._restored(_select(found, cfg.key, f"args.{cfg.source}"))
        except Exception as error:  # the training continues without the images
            args.report.drop(cfg.name, error)
            return
        args.report.add_image(cfg.name, images)

    def _restored(self, images: Any) -> Any:
        """Return the first images of the batch, in their colors before the normalization."""
        images = images[: self.cfg.max_images] if images.ndim == 4 else images
        if self.cfg.mean is None or self.cfg.std is None:
            return images
        images = torch.as_tensor(images).float()
        shape = (-1, 1, 1)  # channels first, as torchvision's Normalize requires
        mean = images.new_tensor(self.cfg.mean).reshape(shape)
        std = images.new_tensor(self.cfg.std).reshape(shape)
        return (images * std + mean).clamp(0, 1)


def _select(value: Any, key: str | None, place: str) -> Any:
    """Return the images at a dotted key; without a key, those of a batch with one obvious place."""
    if key is None and isinstance(value, Sequence) and len(value):
        value = value[0]
    for part in () if key is None else key.split("."):
        place = f"{place}.{part}"
        if isinstance(value, Mapping):
            if part not in value:
                raise MediaError(f"no {place}; expected one of {', '.join(map(str, value))}")
            value = value[part]
        elif part.isdecimal() and isinstance(value, Sequence) and int(part) < len(value):
            value = value[int(part)]
        elif hasattr(value, part):
            value = getattr(value, part)
        else:
            raise MediaError(f"no {place}; found a {type(value).__name__} around it")
    if not hasattr(value, "ndim"):
        keys = f" with {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
        raise MediaError(
            f"expected a tensor or array of images in {place}, found a "
            f"{type(value).__name__}{keys}; set key to the place of the images"
        )
    return value


class LogImagesConfig(PipelineHooksConfig[LogImages]):
    """Place of the images, and trigger."""

    class_type: type[LogImages] = LogImages
    every: TriggerField = Field(
        default="first | 1000 steps", description="Trigger, such as '500 steps from 0'."
    )
    source: Literal["batch", "outputs"] = Field(
        default="batch", description="Images of the batch, or of the batch processor's outputs."
    )
    key: str | None = Field(
        default=None,
        min_length=1,
        description="Dotted key of the images, such as 'observation.image' or '0'; default: the "
        "batch itself, or its first item.",
    )
    name: str = Field(
        default="batch/images",
        min_length=1,
        description="Name of the images.",
    )
    max_images: int = Field(default=16, ge=1, description="Maximum number of images to show.")
    mean: list[float] | None = Field(
        default=None, description="Mean of each channel that the data was normalized by."
    )
    std: list[float] | None = Field(
        default=None, description="Standard deviation of each channel, to undo with the mean."
    )

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("expected mean and std together, such as mean=[0.5] and std=[0.5]")
