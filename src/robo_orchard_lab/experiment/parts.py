"""Fields of an experiment and of its parts, with their help texts and resume rules.

`ExperimentFields` is the only list of fields; help, JSON Schema, prevalidation and resume checks
derive from it. Nothing here imports torch: kinds of parts are references, imported when a value
is validated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    field_validator,
    model_validator,
)

from robo_orchard_core.utils.config import (
    ClassConfig,
    Config,
    ConfigError,
    ConfigFieldError,
    FieldsOf,
    Function,
    Part,
)
from robo_orchard_core.utils.config.build import CallableConfig
from robo_orchard_core.utils.config.errors import (
    at_path,
    describe,
    suggest_name,
    unknown_field,
    validate_value,
)
from robo_orchard_core.utils.config.parts import (
    CONFIG_BASES,
    FIELD_TYPES,
    FUNCTION_BASES,
    STAND_INS,
    UNTYPED_PARAMETERS,
)
from robo_orchard_core.utils.config.references import union_members
from robo_orchard_lab.experiment.from_data import check_stand_ins, is_from_data
from robo_orchard_lab.experiment.overrides import are_named_parts
from robo_orchard_lab.foreign_fields import Form, foreign_remedy

ResumeEffect: TypeAlias = Literal["harmless", "trajectory", "impossible"]
"""Effect of a changed value on a resumed run.

``harmless``: the weights after each step stay the same. ``trajectory``: they change.
``impossible``: a checkpoint can't resume that way, or would silently undo the change.
"""


@dataclass(frozen=True)
class OnResume:
    """Resume rule of a field, as metadata in ``Annotated``; the default is ``trajectory``.

    Attributes:
        effect: Effect of another value, or of a part of another class.
        why: Reason, for the user; empty where the reason is obvious.
        within: Rules for the arguments of a part by name; ``"*"`` stands for all others. Without
            an entry, the rule of the field applies.
    """

    effect: ResumeEffect
    why: str = ""
    within: Mapping[str, OnResume] = field(default_factory=dict, hash=False)


HARMLESS = OnResume("harmless")
_ORDER = OnResume("impossible", "the order of samples depends on this field")
_SAVED = OnResume("impossible", "a resumed run restores this value from the checkpoint")
_NEW_LR = OnResume("trajectory", "from the resumed step on, on the new curve")
_GROUP = OnResume(_SAVED.effect, _SAVED.why, {"lr": _NEW_LR, "*": _SAVED})
_GROUPS = OnResume(_SAVED.effect, _SAVED.why, {"*": _GROUP})
_OPTIMIZER = OnResume(_SAVED.effect, _SAVED.why, {**_GROUP.within, "groups": _GROUPS})
_LR_SCHEDULER_STEPS = dict.fromkeys(("every", "monitor"), OnResume("trajectory"))
_OTHER_CODE = "the checkpoint belongs to another class"


def _data_type(value: Any) -> Any:
    """Return the ``torch.dtype`` of a text such as ``"float32"``."""
    import torch

    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"expected a dtype such as 'float32', found {describe(value)}")
    return value


def _device(value: Any) -> Any:
    """Return the ``torch.device`` of a text such as ``"cuda:0"``."""
    import torch

    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected a device such as 'cuda:0', found {describe(value)}") from error


def _as_text(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _from_text(validate: Callable[[Any], Any]) -> Any:
    validator = PlainValidator(validate, json_schema_input_type=str)
    return Annotated[Any, validator, PlainSerializer(_as_text)]


DataType: Any = _from_text(_data_type)
Device: Any = _from_text(_device)
FIELD_TYPES["torch:dtype"] = DataType
FIELD_TYPES["torch:device"] = Device
UNTYPED_PARAMETERS["torch", "dtype"] = DataType | None  # torch's layers leave these two unannotated
UNTYPED_PARAMETERS["torch", "device"] = Device | None
FIELD_TYPES["torch:Tensor"] = None
FIELD_TYPES["torch._C:Generator"] = None


AUTO = "auto"
Auto: TypeAlias = Literal["auto"]

ModelPart: TypeAlias = Annotated[Any, Part("torch.nn.modules.module:Module")]
"""Module, by its class or by a function that returns a module."""

DatasetPart: TypeAlias = Annotated[
    Any, Part(("torch.utils.data.dataset:Dataset", "collections.abc:Iterable"))
]
"""Torch dataset or any iterable."""

SamplerPart: TypeAlias = Annotated[
    Any, Part("torch.utils.data.sampler:Sampler", given=("data_source",))
]
"""Sampler of indices; a parameter ``data_source`` receives the dataset."""

FIELD_TYPES["torch.utils.data.sampler:Sampler"] = SamplerPart

BatchProcessorPart: TypeAlias = Annotated[
    Any,
    Part(
        "robo_orchard_lab.pipeline.batch_processor:SimpleBatchProcessor",
        functions="call",
    ),
]
"""Batch processor, or a function ``forward(model, batch)``."""

HooksPart: TypeAlias = Annotated[Any, Part("robo_orchard_lab.pipeline.hook_set:PipelineHooks")]
"""Pipeline hooks."""

OptimizerPart: TypeAlias = Annotated[
    Any, Part("torch.optim.optimizer:Optimizer", given=("params",))
]
"""Optimizer of all or some parameters, with optional parameter groups."""

LRSchedulerPart: TypeAlias = Annotated[
    Any, Part("torch.optim.lr_scheduler:LRScheduler", given=("optimizer",), unannotated=True)
]
"""LR scheduler, which may hold other LR schedulers, or a function that returns one."""

FIELD_TYPES["torch.optim.lr_scheduler:LRScheduler"] = LRSchedulerPart

_ONE, _NAMED = "one part", "named parts"  # labels that no key of a mapping has
_BY_FORM = Discriminator(lambda value: _NAMED if value == {} or are_named_parts(value) else _ONE)
if TYPE_CHECKING:
    Optimizers: TypeAlias = Any
    LRSchedulers: TypeAlias = Any
else:
    Optimizers = Annotated[
        Annotated[OptimizerPart, Tag(_ONE)] | Annotated[dict[str, OptimizerPart], Tag(_NAMED)],
        _BY_FORM,
    ]
    """One optimizer, or several by name."""
    LRSchedulers = Annotated[
        Annotated[LRSchedulerPart, Tag(_ONE)] | Annotated[dict[str, LRSchedulerPart], Tag(_NAMED)],
        _BY_FORM,
    ]
    """One LR scheduler, or several by the names of their optimizers."""

CheckpointPart: TypeAlias = Annotated[
    Any, FieldsOf("robo_orchard_lab.pipeline.hooks.save_checkpoint:SaveCheckpointConfig")
]
"""Fields of ``SaveCheckpoint``."""


class LoaderConfig(Config):
    """Arguments of torch's ``DataLoader``."""

    dataset: Annotated[
        DatasetPart, OnResume("trajectory", "refused if the number of samples differs")
    ] = Field(description="Dataset to load.")
    batch_size: Annotated[
        int | None,
        OnResume("trajectory", "within an epoch, set data.order.allow_other_batch_size"),
    ] = Field(
        default=1, ge=1, description="Samples per batch of one process; null: dataset's batches."
    )
    shuffle: Annotated[bool, _ORDER] = Field(
        default=False, description="Shuffle the samples in each epoch."
    )
    drop_last: bool = Field(default=False, description="Drop a last batch that is smaller.")
    num_workers: Annotated[int, HARMLESS] = Field(
        default=0, ge=0, description="Worker processes per rank."
    )
    sampler: Annotated[SamplerPart | None, _ORDER] = Field(
        default=None, description="Sampler instead of shuffle."
    )
    batch_sampler: Annotated[SamplerPart | None, _ORDER] = Field(
        default=None, description="Instead of batch_size, shuffle, sampler and drop_last."
    )
    collate_fn: Function | None = Field(
        default=None, description="Function from samples to a batch."
    )
    worker_init_fn: Function | None = Field(
        default=None, description="Function of a worker's index, called when the worker starts."
    )
    pin_memory: Annotated[bool, HARMLESS] = Field(
        default=False, description="Copy batches to pinned memory."
    )
    timeout: Annotated[float, HARMLESS] = Field(
        default=0, ge=0, description="Seconds to wait for a worker; 0: no limit."
    )
    prefetch_factor: Annotated[int | None, HARMLESS] = Field(
        default=None, ge=1, description="Batches that each worker prefetches."
    )
    persistent_workers: Annotated[bool, HARMLESS] = Field(
        default=False,
        description="Keep workers alive between epochs; they load the next epoch ahead.",
    )

    def __post_init__(self) -> None:
        exclusive = {
            "batch_sampler": ("batch_size", "shuffle", "sampler", "drop_last"),
            "sampler": ("shuffle",),
        }
        for name, others in exclusive.items():
            for other in others:
                is_default = getattr(self, other) == type(self).model_fields[other].default
                if getattr(self, name) is not None and not is_default:
                    problem = f"can't be combined with {other}; remove one of them"
                    raise ConfigFieldError(problem, (name,))
        if self.num_workers == 0:
            for name in ("prefetch_factor", "persistent_workers", "worker_init_fn"):
                if getattr(self, name):
                    problem = "requires worker processes; set num_workers above 0"
                    raise ConfigFieldError(problem, (name,))


class DataOrderConfig(Config):
    """Options of the sample order, in addition to the experiment's seed; see ``DataOrder``."""

    keyed_by: Annotated[
        Literal["batch", "sample", "none"],
        OnResume("impossible", "the order of samples depends on this field and the seed"),
    ] = Field(default="batch", description="Unit that keys the randomness of loading.")
    fast_forward: Annotated[bool, HARMLESS] = Field(
        default=False, description="On resume, read consumed data again if it can't be seeked."
    )
    allow_other_batch_size: Annotated[bool, HARMLESS] = Field(
        default=False, description="Allow another batch size on resume within an epoch."
    )


class DataConfig(Config):
    """Data for training and evaluation."""

    train: LoaderConfig | None = Field(
        description="Loader of the training data; null: passed to build()."
    )
    evaluation: Annotated[dict[str, LoaderConfig], HARMLESS] = Field(
        default={}, description="Evaluation sets by name, for every ValidationHook."
    )
    test: Annotated[dict[str, LoaderConfig] | None, HARMLESS] = Field(
        default=None,
        min_length=1,
        description="Test sets by name, for the commands test and predict only.",
    )
    order: DataOrderConfig = Field(
        default=DataOrderConfig(), description="Options of the sample order."
    )

    def __post_init__(self) -> None:
        for name in self.test or ():
            if name in self.evaluation:
                raise ConfigFieldError("is an evaluation set, too; rename one", ("test", name))


class ParameterGroup(Config):
    """Group of parameters with its own optimizer options.

    In addition to ``parameters``, a group accepts each option that the optimizer has per group:
    ``lr``, ``weight_decay``, ``betas`` ....
    """

    is_sparse: ClassVar[bool] = True
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Any]

    parameters: list[str] | Literal["norms_and_biases"] = Field(
        description="Patterns of parameter names, such as 'backbone.*', or norms_and_biases."
    )

    if TYPE_CHECKING:

        def __init__(
            self, *, parameters: list[str] | Literal["norms_and_biases"], **options: Any
        ) -> None: ...

    @field_validator("parameters", mode="before")
    @classmethod
    def _refuse_single_pattern(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "norms_and_biases":
            raise ConfigFieldError(
                f"expected a list of patterns, or norms_and_biases, found {value!r}; write "
                f"[{value!r}]"
            )
        return value

    def options(self) -> dict[str, Any]:
        """Return the optimizer options of this group."""
        return dict(self.model_extra or {})


class OptimizerFields(Config):
    """Fields of every optimizer, in addition to its own parameters."""

    parameters: str | list[str] | None = Field(
        default=None,
        description="Patterns of the optimizer's parameters, such as 'generator.*'; null: all.",
    )


class OptimizerFunctionConfig(OptimizerFields, CallableConfig[Any]):
    """Fields of a function that returns an optimizer."""


class OptimizerConfig(OptimizerFields, ClassConfig[Any]):
    """Fields of a class of optimizers."""

    groups: dict[str, ParameterGroup] = Field(
        default={}, description="Parameter groups by name; the first match counts."
    )

    @model_validator(mode="after")
    def _validate_group_options(self) -> OptimizerConfig:
        """Convert the options of each group to the optimizer's types; refuse unknown options."""
        cls = type(self)
        if cls.model_config.get("extra") == "allow":
            return self
        known = cls.model_fields.keys() - OptimizerConfig.model_fields.keys() - {"params"}
        converted = {}
        for group_name, group in self.groups.items():
            options = group.options()
            for name, value in options.items():
                with at_path("groups", group_name):
                    if name not in known:
                        raise unknown_field(name, known, cls.__name__.removesuffix("Config"))
                    options[name] = validate_value(name, value, cls.model_fields[name].annotation)
            converted[group_name] = ParameterGroup(parameters=group.parameters, **options)
        if converted != self.groups:
            self.groups = converted
        return self


class LRSchedulerFields(Config):
    """Fields of every LR scheduler, in addition to its own parameters.

    An integer parameter may be ``auto``: the number of LR scheduler steps in the run.
    """

    every: Literal["optimizer_step", "epoch"] | None = Field(
        default=None,
        description="Interval of the LR scheduler; null: its class's default, mostly "
        "optimizer_step.",
    )
    monitor: str | None = Field(
        default=None,
        description="Metric that ReduceLROnPlateau follows, such as 'eval/val/loss'; null: the "
        "mean training loss.",
    )


class LRSchedulerConfig(LRSchedulerFields, ClassConfig[Any]):
    """Fields of a class of LR schedulers."""


class LRSchedulerFunctionConfig(LRSchedulerFields, CallableConfig[Any]):
    """Fields of a function that returns an LR scheduler."""


def _is_auto(value: Any, declaration: Any) -> bool:
    """Return True for ``auto`` in place of an integer, see `check_stand_ins`."""
    return value == AUTO and int in union_members(declaration)


STAND_INS += [_is_auto, is_from_data]
CONFIG_BASES["torch.optim.optimizer:Optimizer"] = OptimizerConfig
CONFIG_BASES["torch.optim.lr_scheduler:LRScheduler"] = LRSchedulerConfig
FUNCTION_BASES["torch.optim.optimizer:Optimizer"] = OptimizerFunctionConfig
FUNCTION_BASES["torch.optim.lr_scheduler:LRScheduler"] = LRSchedulerFunctionConfig


class _Settings(Config):
    @classmethod
    def remedy_for(cls, name: str, value: Any, form: Form) -> str:
        return foreign_remedy("trainer", name, value, form)


class TrainerConfig(_Settings):
    """Limits of a run and options of its trainer; see ``HookBasedTrainer``."""

    max_epoch: Annotated[int | None, HARMLESS] = Field(
        default=None, ge=1, description="Limit of epochs."
    )
    max_step: Annotated[int | None, HARMLESS] = Field(
        default=None, ge=1, description="Limit of steps (batches)."
    )
    max_optimizer_step: Annotated[int | None, HARMLESS] = Field(
        default=None, ge=1, description="Limit of committed updates."
    )
    agree_every: Annotated[int | None, HARMLESS] = Field(
        default=None,
        ge=1,
        description="Steps between agreements of the ranks; null: chosen by cost.",
    )
    stall_timeout_s: Annotated[float | None, HARMLESS] = Field(
        default=None, gt=0, description="Seconds without progress after which a run ends."
    )


class AcceleratorConfig(_Settings):
    """Devices, precision and accumulation; see Accelerate's ``Accelerator``."""

    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"],
        OnResume("trajectory", "refused if one of the two is fp16"),
    ] = Field(default="no", description="Precision of forward and backward passes.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Batches per optimizer step."
    )
    cpu: Annotated[bool | Auto, OnResume("trajectory", "refused if the type of device differs")] = (
        Field(default="auto", description="Train on the CPU; auto: if there is no other device.")
    )
    find_unused_parameters: Annotated[bool, HARMLESS] = Field(
        default=False,
        description="For several processes and models that skip some parameters in some steps.",
    )


class InitialWeights(Config):
    """Weights to begin with; see `load_weights`. A resume restores its checkpoint instead."""

    path: str = Field(
        min_length=1,
        description="Run folder, checkpoint, *.safetensors file, index of sharded files, folder "
        "with such files, or hub:OWNER/NAME[@REVISION].",
    )
    checkpoint: Literal["newest", "best"] = Field(
        default="newest", description="Checkpoint of a run folder."
    )
    weights: str | None = Field(
        default=None,
        description="Name of the run's hook with other weights, such as ema; null: the model's.",
    )
    include: list[str] = Field(
        default=["*"], min_length=1, description="Patterns of names in the model to load."
    )
    exclude: list[str] = Field(
        default=[], description="Patterns of names in the model to leave as they are."
    )
    rename: dict[str, str] = Field(
        default={},
        description="New prefixes by prefixes of names in the file; the first match counts.",
    )
    on_mismatch: Annotated[
        dict[str, Literal["skip", "overlap", "interpolate"]],
        BeforeValidator(
            lambda rule: {"*": rule} if isinstance(rule, str) else rule,
            json_schema_input_type=str | dict[str, str],
        ),
    ] = Field(
        default={},
        description="By pattern of names in the model: what to do with another shape; else an "
        "error. A rule alone is for all names.",
    )


class CompileConfig(Config):
    """Options of ``torch.compile``."""

    backend: str = Field(default="inductor", min_length=1, description="Compiler backend.")
    mode: (
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    ) = Field(default=None, description="Trade-off of the backend inductor.")
    fullgraph: bool = Field(default=False, description="Raise an error at a graph break.")
    dynamic: bool | None = Field(
        default=None, description="Compile for any sizes; null: after the first change."
    )
    options: dict[
        Literal[
            "epilogue_fusion",
            "fallback_random",
            "max_autotune",
            "shape_padding",
            "triton.cudagraphs",
        ],
        bool,
    ] = Field(default={}, description="Switches of the backend inductor, instead of a mode.")

    def __post_init__(self) -> None:
        if self.mode is not None and self.options:
            raise ConfigFieldError("can't be combined with mode; remove one of them", ("options",))


CHECKPOINT = "checkpoint"
"""Name of the hook that the field of this name describes."""


def _check_optimizers(optimizer: Any, lr_scheduler: Any) -> None:
    """Check the names of optimizers, and that each has its parameters."""
    are_named = isinstance(optimizer, dict)
    if are_named:
        with at_path("optimizer"):
            _check_named(optimizer)
    if lr_scheduler is None:
        return
    with at_path("lr_scheduler"):
        if optimizer is None:
            raise ConfigFieldError("requires an optimizer; set optimizer")
        if are_named and not isinstance(lr_scheduler, dict):
            raise ConfigFieldError(
                "expected LR schedulers by the names of their optimizers, found one without a "
                f"name; write {next(iter(optimizer))}: {{class_type: ...}}"
            )
        if isinstance(lr_scheduler, dict) and not are_named:
            raise ConfigFieldError(
                "expected one LR scheduler, since its optimizer has no name, found a mapping of "
                "names; write class_type or func in it"
            )
        for name in (name for name in lr_scheduler if are_named and name not in optimizer):
            advice = suggest_name(name, optimizer, "there is")
            raise ConfigFieldError(f"there is no optimizer of this name; {advice}", (name,))


def _check_named(optimizers: Mapping[str, Config]) -> None:
    if not optimizers:
        raise ConfigFieldError("expected an optimizer, or several by name, found {}; write null")
    classes = {type(config) for config in optimizers.values()}
    fields = {field: cls.__name__ for cls in classes for field in cls.model_fields}
    for name, config in optimizers.items():
        with at_path(name):
            if not name.isidentifier():
                raise ConfigFieldError("expected a name of letters, digits and underscores")
            if name in fields:  # --optimizer.lr would be ambiguous
                owner = fields[name].removesuffix("Config")
                problem = f"expected the name of an optimizer, found a field of {owner}"
                raise ConfigFieldError(f"{problem}; choose another name")
            if len(optimizers) > 1 and getattr(config, "parameters", None) is None:
                raise ConfigError(  # no field error: the option null is not the pattern "null"
                    "with several optimizers, each needs the patterns of its parameters, such as "
                    f"parameters: '{name}.*'"
                )


class ExperimentFields(Config):
    """Fields of an experiment; `ExperimentConfig` adds reading from files and building."""

    name: Annotated[str, HARMLESS] = Field(
        default="experiment", min_length=1, description="Name of the run, for people."
    )
    seed: Annotated[
        int,
        OnResume(
            "impossible", "the order of samples and the RNG states in checkpoints depend on it"
        ),
    ] = Field(default=0, ge=0, lt=2**32, description="Seed of weights, sample order and noise.")
    run_folder: Annotated[
        str | None,
        BeforeValidator(lambda path: str(path) if isinstance(path, Path) else path),
        HARMLESS,
    ] = Field(
        default=None,
        description="Folder of everything that the run writes; null: runs/NAME. A file's folder "
        "lies below the current one.",
    )
    model: Annotated[
        ModelPart | None,
        OnResume(
            "impossible",
            _OTHER_CODE,
            {"*": OnResume("trajectory", "refused if names or shapes of weights differ")},
        ),
    ] = Field(description="Module to train; null: passed to build().")
    init_from: Annotated[
        InitialWeights | None, OnResume("impossible", "a resume restores the checkpoint's weights")
    ] = Field(default=None, description="Weights of a new run to begin with.")
    compile: Annotated[
        CompileConfig | None,
        BeforeValidator(
            lambda value: (
                {True: CompileConfig(), False: None}[value] if isinstance(value, bool) else value
            ),
            json_schema_input_type=bool | CompileConfig | None,
        ),
    ] = Field(default=None, description="Options of torch.compile for the model; true: defaults.")
    gradient_checkpointing: Annotated[bool | list[str], HARMLESS] = Field(
        default=False,
        description="Compute activations again in the backward pass: patterns of module names, or "
        "true for the model's own gradient_checkpointing_enable().",
    )
    data: DataConfig = Field(description="Data for training and evaluation.")
    batch_processor: BatchProcessorPart | None = Field(
        description="Turns a batch into outputs and loss; a function is forward(model, batch); "
        "null: passed to build()."
    )
    optimizer: Annotated[Optimizers | None, _OPTIMIZER] = Field(
        default=None, description="Optimizer, or optimizers by name."
    )
    lr_scheduler: Annotated[
        LRSchedulers | None,
        OnResume(_NEW_LR.effect, _NEW_LR.why, _LR_SCHEDULER_STEPS),
    ] = Field(
        default=None,
        description="LR scheduler, or LR schedulers by optimizer; integers may be auto.",
    )
    hooks: dict[str, HooksPart] = Field(
        default={}, description="Hooks by name; the first is the outermost."
    )
    trainer: TrainerConfig = Field(description="Limits of the run and options of the trainer.")
    accelerator: AcceleratorConfig = Field(
        default=AcceleratorConfig(), description="Devices, precision and accumulation."
    )
    checkpoint: Annotated[
        CheckpointPart | None,
        OnResume(
            "impossible",
            "the hook's state is in the checkpoint",
            {
                "folder": OnResume("impossible", "checkpoints are looked up in that folder"),
                "*": HARMLESS,
            },
        ),
    ] = Field(default={}, description="Fields of SaveCheckpoint; null: no checkpoints.")
    resume: Annotated[Literal["auto", "never"], HARMLESS] = Field(
        default="auto", description="Resume from the newest checkpoint, or never."
    )

    def __post_init__(self) -> None:
        limits = ("max_epoch", "max_step", "max_optimizer_step")
        if all(getattr(self.trainer, limit) is None for limit in limits):
            raise ConfigFieldError(
                f"the run has no limit; set one of {', '.join(limits)}", ("trainer",)
            )
        if self.checkpoint is not None and CHECKPOINT in self.hooks:
            raise ConfigFieldError(
                "this name belongs to the hook of the field `checkpoint`; rename the hook",
                ("hooks", CHECKPOINT),
            )
        _check_optimizers(self.optimizer, self.lr_scheduler)
        check_stand_ins(self)
        if self.gradient_checkpointing and self.compile is not None and self.compile.fullgraph:
            raise ConfigFieldError(
                "can't be combined with gradient_checkpointing, whose modules are graph breaks; "
                "remove one of them",
                ("compile", "fullgraph"),
            )
        hooks: dict[tuple[str, ...], Any] = {("hooks", n): hook for n, hook in self.hooks.items()}
        if self.checkpoint is not None:
            hooks[CHECKPOINT,] = self.checkpoint
        if hooks:
            from robo_orchard_lab.pipeline.run.run_path import check_run_paths
        for path, hook in hooks.items():
            with at_path(*path):
                check_run_paths(hook)

    def folder(self) -> Path:
        """Return the run folder."""
        return Path("runs", self.name) if self.run_folder is None else Path(self.run_folder)
