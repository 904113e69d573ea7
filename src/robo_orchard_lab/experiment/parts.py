"""The parts of an experiment, as they are described in its file.

Nothing here imports torch: the kinds are named, and looked up once a value is validated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from robo_orchard_core.utils.config import (
    ClassConfig,
    Config,
    ConfigError,
    ConfigFieldError,
    FieldsOf,
    Function,
    Part,
)
from robo_orchard_core.utils.config.errors import describe, unknown_field, validate_value
from robo_orchard_core.utils.config.parts import CONFIG_BASES, FIELD_TYPES, UNTYPED_PARAMETERS

# --- tensor values ---------------------------------------------------------------------------
# How values of torch's that are neither plain data nor parts stand in files.


def _data_type(value: Any) -> Any:
    """``torch.float32`` of ``"float32"``."""
    import torch

    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    if not isinstance(value, torch.dtype):
        raise ValueError(
            f"expected a data type of tensors, like 'float32', found {describe(value)}"
        )
    return value


def _device(value: Any) -> Any:
    """``torch.device("cuda", 0)`` of ``"cuda:0"``."""
    import torch

    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected a device, like 'cuda:0', found {describe(value)}") from error


def _as_text(value: Any) -> str:
    return str(value).removeprefix("torch.")


DataType = Annotated[
    Any, PlainValidator(_data_type, json_schema_input_type=str), PlainSerializer(_as_text)
]
Device = Annotated[
    Any, PlainValidator(_device, json_schema_input_type=str), PlainSerializer(_as_text)
]

FIELD_TYPES["torch:dtype"] = DataType
FIELD_TYPES["torch:device"] = Device
UNTYPED_PARAMETERS["torch", "dtype"] = DataType | None  # as all layers have them
UNTYPED_PARAMETERS["torch", "device"] = Device | None
FIELD_TYPES["torch:Tensor"] = None
FIELD_TYPES["torch._C:Generator"] = None


AUTO = "auto"
Auto: TypeAlias = Literal["auto"]

ModelPart: TypeAlias = Annotated[Any, Part("torch.nn.modules.module:Module")]
"""A module, by its class or by a function that returns one."""

DatasetPart: TypeAlias = Annotated[
    Any, Part(("torch.utils.data.dataset:Dataset", "collections.abc:Iterable"))
]
"""A dataset of torch's, or anything that can be iterated."""

SamplerPart: TypeAlias = Annotated[
    Any, Part("torch.utils.data.sampler:Sampler", given=("data_source",))
]
"""A sampler of indices; a ``data_source`` that it takes is the dataset."""

FIELD_TYPES["torch.utils.data.sampler:Sampler"] = SamplerPart

BatchProcessorPart: TypeAlias = Annotated[
    Any,
    Part(
        "robo_orchard_lab.pipeline.batch_processor:SimpleBatchProcessor",
        functions="are called",
    ),
]
"""A batch processor; a function is ``forward(model, batch)``."""

HooksPart: TypeAlias = Annotated[Any, Part("robo_orchard_lab.pipeline.hook_set:PipelineHooks")]
"""A bundle of hooks."""

OptimizerPart: TypeAlias = Annotated[
    Any,
    Part("torch.optim.optimizer:Optimizer", given=("params",)),
]
"""An optimizer, with groups of parameters."""

LRSchedulerPart: TypeAlias = Annotated[
    Any,
    Part("torch.optim.lr_scheduler:LRScheduler", given=("optimizer",)),
]
"""A schedule of learning rates, which may hold others."""

FIELD_TYPES["torch.optim.lr_scheduler:LRScheduler"] = LRSchedulerPart

CheckpointPart: TypeAlias = Annotated[
    Any, FieldsOf("robo_orchard_lab.pipeline.hooks.save_checkpoint:SaveCheckpointConfig")
]
"""The fields of ``SaveCheckpoint``."""


class LoaderConfig(Config):
    """Batches of a dataset, as torch's ``DataLoader`` makes them."""

    dataset: DatasetPart = Field(description="What there is to load.")
    batch_size: int | None = Field(
        default=1, ge=1, description="Samples in a batch of one process; null: the dataset's own."
    )
    shuffle: bool = Field(default=False, description="Whether each epoch has an order of its own.")
    drop_last: bool = Field(default=False, description="Leave out a last batch that is smaller.")
    num_workers: int = Field(default=0, ge=0, description="Loading processes, beside each process.")
    sampler: SamplerPart | None = Field(default=None, description="In the place of shuffle.")
    batch_sampler: SamplerPart | None = Field(
        default=None, description="In the place of batch_size, shuffle, sampler and drop_last."
    )
    collate_fn: Function | None = Field(default=None, description="From samples to a batch.")
    pin_memory: bool = Field(default=False, description="Whether batches lie in pinned memory.")
    timeout: float = Field(default=0, ge=0, description="Seconds to wait for a worker; 0: no end.")
    prefetch_factor: int | None = Field(default=None, ge=1, description="Batches ahead, a worker.")
    persistent_workers: bool = Field(default=False, description="Workers outlive an epoch.")

    def __post_init__(self) -> None:
        taken = {
            "batch_sampler": ("batch_size", "shuffle", "sampler", "drop_last"),
            "sampler": ("shuffle",),
        }
        for name, others in taken.items():
            for other in others:
                is_default = getattr(self, other) == type(self).model_fields[other].default
                if getattr(self, name) is not None and not is_default:
                    problem = f"stands in the place of {other}; leave one of them out"
                    raise ConfigFieldError(problem, (name,))
        if self.num_workers == 0:
            for name in ("prefetch_factor", "persistent_workers"):
                if getattr(self, name):
                    problem = "is for loading processes; set num_workers above 0"
                    raise ConfigFieldError(problem, (name,))


class DataOrderConfig(Config):
    """What the order of samples follows from, beside the experiment's seed; see ``DataOrder``."""

    keyed_by: Literal["batch", "sample", "none"] = Field(
        default="batch", description="What the randomness of loading belongs to."
    )
    fast_forward: bool = Field(
        default=False, description="Read what was done again, where data has no index nor state."
    )
    allow_other_batch_size: bool = Field(
        default=False, description="Whether a run may go on with other batches within an epoch."
    )


class DataConfig(Config):
    """What is trained on, and what it is evaluated on."""

    train: LoaderConfig | None = Field(
        description="The batches to learn from; null: given to build()."
    )
    evaluation: dict[str, LoaderConfig] = Field(
        default={}, description="Sets to evaluate on, by name; each ValidationHook takes them."
    )
    order: DataOrderConfig = Field(
        default=DataOrderConfig(), description="What the order of samples follows from."
    )


class ParameterGroup(Config):
    """Some of a model's parameters, and the optimizer's options for them alone.

    Beside ``parameters``, any option of the optimizer that it takes by group: ``lr``,
    ``weight_decay``, ``betas`` ....
    """

    is_sparse: ClassVar[bool] = True
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Any]

    parameters: list[str] | Literal["norms_and_biases"] = Field(
        description="Patterns of names, such as 'backbone.*', or norms_and_biases."
    )

    if TYPE_CHECKING:

        def __init__(
            self, *, parameters: list[str] | Literal["norms_and_biases"], **options: Any
        ) -> None: ...

    def options(self) -> dict[str, Any]:
        """The optimizer's options for this group."""
        return dict(self.__pydantic_extra__ or {})


class OptimizerConfig(ClassConfig[Any]):
    """What every optimizer has beside its own parameters."""

    groups: dict[str, ParameterGroup] = Field(
        default={}, description="Parameters with options of their own; the first match counts."
    )

    @model_validator(mode="after")
    def _knows_the_options(self) -> OptimizerConfig:
        """That each group has options that the optimizer has; they become of their types."""
        cls = type(self)
        if cls.model_config.get("extra") == "allow":
            return self
        converted = {}
        for group_name, group in self.groups.items():
            options = group.options()
            for name, value in options.items():
                options[name] = self._as_declared(name, value, ("groups", group_name))
            converted[group_name] = ParameterGroup(parameters=group.parameters, **options)
        if converted != self.groups:
            self.groups = converted
        return self

    @classmethod
    def _as_declared(cls, name: str, value: Any, path: tuple[str, ...]) -> Any:
        known = cls.model_fields.keys() - OptimizerConfig.model_fields.keys() - {"params"}
        if name not in known:
            raise unknown_field(name, known, cls.__name__.removesuffix("Config"), path)
        try:
            return validate_value(name, value, cls.model_fields[name].annotation)
        except ConfigError as error:
            raise error.under(path) from error.__cause__


class LRSchedulerConfig(ClassConfig[Any]):
    """What every schedule has beside its own parameters.

    A whole number among these may be ``auto``: how often the schedule moves in the run.
    """

    every: Literal["optimizer_step", "epoch"] | None = Field(
        default=None,
        description="When it moves; null: as its class does, most with each committed update.",
    )

    @classmethod
    def adapt_parameter(cls, declaration: Any) -> Any:
        """Whole numbers may be ``auto``."""
        from robo_orchard_core.utils.config.references import union_members

        return declaration | Auto if int in union_members(declaration) else declaration


CONFIG_BASES["torch.optim.optimizer:Optimizer"] = OptimizerConfig
CONFIG_BASES["torch.optim.lr_scheduler:LRScheduler"] = LRSchedulerConfig


class TrainerConfig(Config):
    """When a run ends, and what its trainer is told; see ``HookBasedTrainer``."""

    max_epoch: int | None = Field(default=None, ge=1, description="Passes over the data.")
    max_step: int | None = Field(default=None, ge=1, description="Batches.")
    max_optimizer_step: int | None = Field(default=None, ge=1, description="Committed updates.")
    agree_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between exchanges of ranks; null: as often as is cheap.",
    )
    stall_timeout_s: float | None = Field(
        default=None, gt=0, description="End a run that makes no progress for so many seconds."
    )


class AcceleratorConfig(Config):
    """Devices, precision and accumulation; see Accelerate's ``Accelerator``."""

    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        default="no", description="The precision of forward and backward passes."
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Batches whose gradients one update takes together."
    )
    cpu: bool | Auto = Field(
        default="auto", description="Train on the CPU; auto: where there is no other device."
    )
    find_unused_parameters: bool = Field(
        default=False,
        description="With several processes, for models that don't use every parameter each time.",
    )
