"""Hooks that report images of the batch or of the outputs, and predictions of a classifier."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.pixels import MediaError
from robo_orchard_lab.pipeline.trigger import TriggerField


class _ImageHook(PipelineHooks):
    """Base of hooks that report images at the end of a step; a failure drops them.

    - Ranks: the main process reports.
    - State: none.
    """

    keeps_trajectory = True
    published_metrics = ()

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        hook = HookContext.from_callable(after=self._report)
        self.register_hook("on_step", hook, when=cfg.every)

    def _report(self, args: PipelineHookArgs) -> None:
        if args.exception is not None or args.is_padding_step or not args.report.is_wanted:
            return
        try:
            self._add(args)
        except Exception as error:  # the training continues without the images
            args.report.drop(self.cfg.name, error)

    @abstractmethod
    def _add(self, args: PipelineHookArgs) -> None:
        """Add the images to ``args.report``."""


class LogImages(_ImageHook):
    """Images of a step's batch or outputs, reported as one grid.

    The run folder gets them, and so does every tracker of the ``MetricsLogger`` that shows images.

    - Ranks: the main process reports its own images.
    - State: none.
    - Cost: where due, a copy of the shown images to the host, which waits for the device, and their
      encoding: about 15 ms for 16 images of 64 x 64 pixels.

    >>> LogImagesConfig(every="500 steps", key="image")().name
    'LogImages'
    """

    reads = ()
    changes = ("report",)
    requests = ()

    cfg: LogImagesConfig

    def __init__(self, cfg: LogImagesConfig) -> None:
        super().__init__(cfg)
        self.declare_effects(reads=["batch" if cfg.source == "batch" else "model_outputs"])

    def _add(self, args: PipelineHookArgs) -> None:
        cfg = self.cfg
        found = args.batch if cfg.source == "batch" else args.model_outputs
        images = _select(found, cfg.key, f"args.{cfg.source}")
        images = images[: cfg.max_images] if images.ndim == 4 else images
        images = _restored(images, cfg.mean, cfg.std)
        args.report.add_image(cfg.name, images)


def _restored(images: Any, mean: list[float] | None, std: list[float] | None) -> Any:
    """Return images in their colors before the normalization."""
    if mean is None or std is None:
        return images
    images = torch.as_tensor(images).float()
    shape = (-1, 1, 1)  # channels first, as torchvision's Normalize requires
    means, stds = (images.new_tensor(values).reshape(shape) for values in (mean, std))
    return (images * stds + means).clamp(0, 1)


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


class SamplePredictions(_ImageHook):
    """Images of a step's batch with an image classifier's predictions, the wrong ones first.

    Reports a grid of images, and a table with truth, prediction and probability of each image. The
    outputs are those of the training step, so no further forward pass is made.

    - Ranks: the main process reports its own batch.
    - State: none.
    - Cost: where due, a copy of the shown images and of the labels to the host, which waits for the
      device, and their encoding.

    >>> SamplePredictionsConfig(every="1 epoch", labels=["cup", "door"])().name
    'SamplePredictions'
    """

    reads = ("batch", "model_outputs")
    changes = ("report",)
    requests = ()

    cfg: SamplePredictionsConfig

    def _add(self, args: PipelineHookArgs) -> None:
        cfg = self.cfg
        images = _select(args.batch, cfg.images, "args.batch")
        truth = _select(args.batch, cfg.targets, "args.batch")
        scores = _select(args.model_outputs, cfg.logits, "args.model_outputs")
        if scores.ndim != 2 or truth.shape != scores.shape[:1] or len(images) != len(truth):
            raise MediaError(
                "expected logits (B, C), targets (B) and images (B, ...), found shapes "
                f"{(*scores.shape,)}, {(*truth.shape,)} and {(*images.shape,)}"
            )
        probability, predicted = scores.detach().float().softmax(-1).max(-1)
        right = predicted == truth
        shown = right.int().argsort(stable=True)[: cfg.max_images]
        found = torch.stack([truth.float(), predicted.float(), probability])[:, shown]
        rows = [
            (number, self._label(int(t)), self._label(int(p)), f"{share:.3f}", int(t) == int(p))
            for number, (t, p, share) in enumerate(found.T.tolist(), start=1)  # a device sync
        ]
        images = _restored(images[shown], cfg.mean, cfg.std)
        args.report.add_image(cfg.name, images, caption=f"{int(right.sum())} of {len(right)} right")
        columns = ("image", "truth", "prediction", "probability", "right")
        args.report.add_table(f"{cfg.name}/labels", rows, columns)

    def _label(self, index: int) -> str:
        labels = self.cfg.labels
        return labels[index] if labels is not None and 0 <= index < len(labels) else str(index)


class SamplePredictionsConfig(PipelineHooksConfig[SamplePredictions]):
    """Places of images, targets and logits, and trigger."""

    class_type: type[SamplePredictions] = SamplePredictions
    every: TriggerField = Field(
        default="1 epoch", description="Trigger, such as '500 steps from 0'."
    )
    images: str = Field(default="0", description="Dotted key of the images in the batch.")
    targets: str = Field(
        default="1", description="Dotted key of the targets in the batch, as numbers of classes."
    )
    logits: str | None = Field(
        default=None,
        min_length=1,
        description="Dotted key of the logits in the outputs; default: the outputs themselves.",
    )
    name: str = Field(default="samples", min_length=1, description="Name of the images.")
    max_images: int = Field(default=16, ge=1, description="Maximum number of images to show.")
    labels: list[str] | None = Field(
        default=None, description="Names of the classes; default: their numbers."
    )
    mean: list[float] | None = Field(
        default=None, description="Mean of each channel that the data was normalized by."
    )
    std: list[float] | None = Field(
        default=None, description="Standard deviation of each channel, to undo with the mean."
    )

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("expected mean and std together, such as mean=[0.5] and std=[0.5]")
