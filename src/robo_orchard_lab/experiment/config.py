"""A whole training run as one validated value, which files can hold."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from pydantic import Field

from robo_orchard_core.utils.config import (
    Config,
    ConfigError,
    ConfigFieldError,
    Trust,
    TrustLike,
)
from robo_orchard_core.utils.config.formats import check_plain
from robo_orchard_lab.experiment.catalogue import ExperimentTrust, with_definitions
from robo_orchard_lab.experiment.document import ExperimentDocument, read_experiment
from robo_orchard_lab.experiment.overrides import Override, from_mapping
from robo_orchard_lab.experiment.parts import (
    AcceleratorConfig,
    BatchProcessorPart,
    CheckpointPart,
    DataConfig,
    HooksPart,
    LRSchedulerPart,
    ModelPart,
    OptimizerPart,
    TrainerConfig,
)
from robo_orchard_lab.experiment.prevalidation import prevalidate

if TYPE_CHECKING:  # with torch
    from robo_orchard_lab.experiment.build import BuiltExperiment, LiveObjects

CHECKPOINT = "checkpoint"
"""The name of the hook that the field of this name describes."""


class ExperimentConfig(Config):
    """A whole training run: what is trained, on what, how, and what goes on around it.

    In code, parts are configs, which `config_of` makes of any class or function:

    >>> import torch
    >>> from robo_orchard_core.utils.config import config_of
    >>> from robo_orchard_lab.experiment.parts import DataConfig, LoaderConfig, TrainerConfig
    >>> from robo_orchard_lab.pipeline import SimpleBatchProcessor
    >>> class Squares(SimpleBatchProcessor):
    ...     def forward(self, model, batch):
    ...         return None, model(batch).square().mean()
    >>> class Points(torch.utils.data.Dataset):
    ...     def __init__(self, size: int) -> None:
    ...         self.points = torch.arange(2.0 * size).reshape(size, 2)
    >>> experiment = ExperimentConfig(
    ...     model=config_of(torch.nn.Linear, in_features=2, out_features=1),
    ...     data=DataConfig(train=LoaderConfig(dataset=config_of(Points, size=8), batch_size=4)),
    ...     batch_processor=config_of(Squares),
    ...     optimizer=config_of(torch.optim.SGD, lr=0.1),
    ...     trainer=TrainerConfig(max_epoch=2),
    ... )
    >>> experiment.replace(**{"optimizer.lr": 0.5}).optimizer.lr
    0.5

    In files, they are mappings with ``class_type`` or ``func``.
    """

    name: str = Field(default="experiment", min_length=1, description="What people call it.")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Of weights, of the order of data, of noise."
    )
    run_folder: str | None = Field(
        default=None,
        description="Where the run keeps what it writes; null: runs/NAME. From a file, below the "
        "folder one starts in.",
    )
    model: ModelPart | None = Field(
        description="What is trained: any module; null: given to build()."
    )
    data: DataConfig = Field(description="What is trained on, and what it is evaluated on.")
    batch_processor: BatchProcessorPart | None = Field(
        description="From a batch to outputs and loss; a function is forward(model, batch); null: "
        "given to build()."
    )
    optimizer: OptimizerPart | None = Field(
        default=None, description="What updates the parameters, in groups if need be."
    )
    lr_scheduler: LRSchedulerPart | None = Field(
        default=None, description="How learning rates change; counts may be auto."
    )
    hooks: dict[str, HooksPart] = Field(
        default={}, description="What goes on around the stages, by name; the first is outermost."
    )
    trainer: TrainerConfig = Field(description="When the run ends, and what its trainer is told.")
    accelerator: AcceleratorConfig = Field(
        default=AcceleratorConfig(), description="Devices, precision and accumulation."
    )
    checkpoint: CheckpointPart | None = Field(
        default={}, description="How the run is saved (SaveCheckpoint's fields); null: not at all."
    )
    resume: Literal["auto", "never"] = Field(
        default="auto", description="Whether to go on from the newest checkpoint, if there is one."
    )

    def __post_init__(self) -> None:
        limits = ("max_epoch", "max_step", "max_optimizer_step")
        if all(getattr(self.trainer, limit) is None for limit in limits):
            raise ConfigFieldError(
                f"the run has no end; set one of {', '.join(limits)}", ("trainer",)
            )
        if self.checkpoint is not None and CHECKPOINT in self.hooks:
            raise ConfigFieldError(
                "this is the name of the hook that `checkpoint` describes; give it another",
                ("hooks", CHECKPOINT),
            )
        if self.lr_scheduler is not None and self.optimizer is None:
            raise ConfigFieldError(
                "there is no optimizer whose learning rates could change", ("lr_scheduler",)
            )
        self._check_what_is_written()

    def _check_what_is_written(self) -> None:
        """That all that hooks write lies in the run's folder."""
        written: dict[tuple[str, ...], Any] = {
            ("hooks", name): hook for name, hook in self.hooks.items()
        }
        if self.checkpoint is not None:
            written[CHECKPOINT,] = self.checkpoint
        if written:
            from robo_orchard_lab.pipeline.run.run_path import check_run_paths
        for path, hook in written.items():
            try:
                check_run_paths(hook)
            except ConfigFieldError as error:
                raise error.under(path) from error.__cause__

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, trust: TrustLike = ()) -> Self:
        """The experiment that plain data describes; short and public names of code count.

        Args:
            document: Fields and their values.
            trust: Packages and classes that it may name, beside those of the catalogue; a `Trust`
                stands for itself, without the catalogue.

        Raises:
            ConfigError: Of the kind that says what is wrong, with the place.
        """
        plain = check_plain(dict(document))
        assert isinstance(plain, dict)
        named = {key: with_definitions(value, (key,)) for key, value in plain.items()}
        if not isinstance(trust, Trust):
            trust = ExperimentTrust.of(trust, pyproject=False).trust
        return super().from_dict(named, trust=trust)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        trust: TrustLike = (),
        overrides: Mapping[str, Any] | Iterable[Override] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """The experiment that a file describes, with the files that it builds on.

        Args:
            path: YAML, TOML or JSON, as its suffix says.
            trust: Packages and classes that it may name, beside those of the catalogue and those
                that the pyproject.toml of the current folder trusts.
            overrides: What counts more than the file: plain data, as files have it, by dotted
                paths. Configs of parts are for `replace`.
            environ: Environment variables whose overrides count more than those; none by default.

        Raises:
            ConfigError: Of the kind that says what is wrong, with the file, the line and the place;
                also where the file can't be read.
        """
        given = from_mapping(overrides) if isinstance(overrides, Mapping) else overrides
        return cls.from_document(read_experiment(path, overrides=given, environ=environ), trust)

    @classmethod
    def from_document(cls, document: ExperimentDocument, trust: TrustLike = ()) -> Self:
        """The experiment that was read by `read_experiment`; `load` says what ``trust`` means.

        What was typed as a value counts as text where the field wants text.

        Raises:
            ConfigError: Of the kind that says what is wrong, with the file, the line and the place.
        """
        if not isinstance(trust, Trust):
            trusted = ExperimentTrust.of(trust)
            trusted.make_local_modules_importable()
            trust = trusted.trust
        prevalidate(document, trust)
        refused: list[ConfigFieldError] = []
        while True:
            try:
                return super().from_dict(document.document, trust=trust)
            except ConfigFieldError as error:
                for before in refused:  # it is no better as text
                    if before.path[: len(error.path)] == error.path:
                        raise document.locate(before) from before.__cause__
                as_text = document.with_text(error.path)
                if as_text is None:
                    raise document.locate(error) from error.__cause__
                refused, document = [*refused, error], as_text
            except ConfigError as error:
                raise document.locate(error) from error.__cause__

    def folder(self) -> Path:
        """The run's folder."""
        return Path("runs", self.name) if self.run_folder is None else Path(self.run_folder)

    def build(self, **live: Unpack[LiveObjects]) -> BuiltExperiment:
        """The prepared trainer and the objects that it has, on every rank alike.

        Args:
            **live: What to take in the place of what is described, see `build_experiment`.

        Raises:
            ConfigError: A part can't be built, with its place.
            Exception: What code that is described raises, and what the trainer does.
        """
        from robo_orchard_lab.experiment.build import build_experiment

        return build_experiment(self, **live)
