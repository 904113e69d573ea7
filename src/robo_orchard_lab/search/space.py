"""Search space of a sweep: metric, parameters, sampler and pruner, from a validated file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from pydantic import Field

from robo_orchard_core.utils.config import Config, ConfigFieldError
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    at_path,
    describe,
    parse_path,
    suggest_name,
)

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import CategoricalChoiceType
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

Number: TypeAlias = int | float
_SEEDED_ONCE = ("GridSampler", "QMCSampler", "BruteForceSampler")  # the seed is that of the order


class Dimension(Config):
    """Values of one field: an interval of numbers, or choices.

    >>> Dimension(low=1e-4, high=0.1, log=True).is_float
    True
    >>> Dimension(choices=[[64, 64], [128]]).labels
    {'[64, 64]': [64, 64], '[128]': [128]}
    """

    low: Number | None = Field(default=None, description="Smallest value.")
    high: Number | None = Field(default=None, description="Largest value, inclusive.")
    log: bool = Field(default=False, description="Sample the logarithm uniformly.")
    step: Number | None = Field(default=None, gt=0, description="Distance of values from low on.")
    type: Literal["int", "float"] | None = Field(
        default=None, description="Type of numbers; by default int if low, high and step are."
    )
    choices: list[Any] | dict[str, Any] | None = Field(
        default=None,
        description="Values to choose from; a mapping gives each value a name, as for optimizers.",
    )

    def __post_init__(self) -> None:
        bounds = [self.low, self.high]
        if (self.choices is None) == (bounds == [None, None]):
            raise ValueError("expected either low and high, or choices")
        if self.choices is not None:
            if not self.choices:
                raise ValueError("expected at least one choice, found none")
            if self.log or self.step is not None or self.type is not None:
                raise ValueError("log, step and type are for numbers from low to high, not choices")
            if len(self.labels) < len(self.choices):
                raise ValueError("expected distinct choices, found one twice")
            return
        if self.low is None or self.high is None:
            raise ValueError("expected both low and high")
        if not self.low <= self.high:
            raise ValueError(f"expected low <= high, found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"expected low > 0 for log: true, found {self.low}")
        if self.log and self.step is not None and not (self.step == 1 and not self.is_float):
            raise ValueError("expected either log or step, found both")
        if not self.is_float and any(isinstance(n, float) for n in (*bounds, self.step)):
            raise ValueError("expected integers for type: int")

    @property
    def is_float(self) -> bool:
        """Return True if the values are floats."""
        if self.type is not None:
            return self.type == "float"
        return any(isinstance(number, float) for number in (self.low, self.high, self.step))

    @property
    def labels(self) -> dict[CategoricalChoiceType, Any]:
        """Choices by the value that the study stores: scalars themselves, others by name."""
        if isinstance(self.choices, Mapping):
            return {name: value for name, value in self.choices.items()}  # noqa: C416 - of another type
        return {
            value if value is None or isinstance(value, bool | int | float | str) else label: value
            for value in self.choices or ()
            for label in [json.dumps(value)]
        }

    def suggest(self, trial: Trial, name: str) -> Any:
        """Return the value of a trial for the field."""
        if self.choices is not None:
            return self.labels[trial.suggest_categorical(name, [*self.labels])]
        assert self.low is not None
        assert self.high is not None
        if self.is_float:
            low, high = float(self.low), float(self.high)
            return trial.suggest_float(name, low, high, step=self.step, log=self.log)
        step = 1 if self.step is None else int(self.step)
        return trial.suggest_int(name, int(self.low), int(self.high), step=step, log=self.log)

    def example(self) -> Any:
        """Return one value, to check the field before the first trial."""
        if self.choices is not None:
            return next(iter(self.labels.values()))
        return float(self.low or 0) if self.is_float else self.low


class SweepSpace(Config):
    """Metric, direction, fields to search, sampler and pruner.

    >>> space = SweepSpace(
    ...     metric="eval/val/loss", parameters={"optimizer.lr": Dimension(low=1e-4, high=0.1)}
    ... )
    >>> space.direction, space.sampler
    ('minimize', {'class_type': 'TPESampler'})
    """

    metric: str = Field(description="Metric to optimize, such as eval/val/loss.")
    direction: Literal["minimize", "maximize"] = Field(
        default="minimize", description="Direction of improvement."
    )
    value: Literal["best", "last"] = Field(
        default="best", description="Result of a run: the metric's best or its last value."
    )
    parameters: dict[str, Dimension] = Field(
        description="Dimensions by dotted field, such as optimizer.lr; also complete parts."
    )
    sampler: dict[str, Any] = Field(
        default={"class_type": "TPESampler"},
        description="Sampler of optuna.samplers with its arguments.",
    )
    pruner: dict[str, Any] | None = Field(
        default=None, description="Pruner of optuna.pruners with its arguments; None for none."
    )

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ValueError("expected at least one field in parameters, found none")
        fields = {name: parse_path(name) for name in self.parameters}
        for name, path in fields.items():
            if path[0] in ("run_folder", "base", "resume"):
                raise ValueError(f"{path[0]} can't be searched; a sweep sets it for each trial")
            if [*fields.values()].count(path) > 1:
                raise ValueError(f"{name} is in parameters twice, spelled in two ways")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file in YAML, TOML or JSON.

        Raises:
            ConfigError: The file can't be read, or a field is invalid; with the location.
        """
        try:
            return cls.load(path)
        except OSError as error:
            problem = ConfigError(f"can't be read: {error.strerror or error}")
            problem.source = os.fspath(path)
            raise problem from error

    def make_sampler(self, trial: int | None = None) -> BaseSampler:
        """Create the sampler, seeded for the number of a trial.

        With one seed for all, a sampler that is created again after a restart would repeat its
        first suggestions.
        """
        import optuna

        arguments = dict(self.sampler)
        name = str(arguments.get("class_type", "")).rpartition(":")[2]
        if name == "GridSampler" and "search_space" not in arguments:
            arguments["search_space"] = self._grid()
        seed = arguments.get("seed")
        if isinstance(seed, int) and trial is not None and name not in _SEEDED_ONCE:
            arguments["seed"] = (seed * 1_000_003 + trial) % 2**32
        made = _make("sampler", optuna.samplers, optuna.samplers.BaseSampler, arguments)
        assert isinstance(made, optuna.samplers.BaseSampler)
        return made

    def _grid(self) -> dict[str, list[CategoricalChoiceType]]:
        for name, dimension in self.parameters.items():
            if dimension.choices is None:
                raise ConfigFieldError(
                    "GridSampler requires choices; write choices, or search_space of the sampler",
                    ("parameters", name),
                )
        return {name: [*dimension.labels] for name, dimension in self.parameters.items()}


def make_pruner(arguments: Mapping[str, Any] | None) -> BasePruner:
    """Create a pruner of Optuna; `optuna.pruners.NopPruner` for None.

    Raises:
        ConfigError: The class is no pruner, or refuses its arguments.
    """
    import optuna

    if arguments is None:
        return optuna.pruners.NopPruner()
    made = _make("pruner", optuna.pruners, optuna.pruners.BasePruner, arguments)
    assert isinstance(made, optuna.pruners.BasePruner)
    return made


def _make(field: str, module: Any, base: type, arguments: Mapping[str, Any]) -> object:
    """Create a class of an Optuna module from a name and arguments."""
    arguments = dict(arguments)
    with at_path(field):
        name = arguments.pop("class_type", None)
        kinds = {
            known: kind
            for known in module.__all__
            if isinstance(kind := getattr(module, known), type) and issubclass(kind, base)
        }
        package, _, short = name.rpartition(":") if isinstance(name, str) else ("", "", "")
        if package not in ("", module.__name__) or short not in kinds or kinds[short] is base:
            advice = suggest_name(short, [*kinds], f"{module.__name__} has")
            raise ConfigFieldError(
                f"expected a class of {module.__name__}, found {describe(name)}; {advice}",
                ("class_type",),
            )
        try:
            return kinds[short](**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigFieldError(f"{short} refuses its arguments: {error}") from error
