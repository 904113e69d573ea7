"""`ExperimentConfig`: a complete training run as one validated value, read from files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from robo_orchard_core.utils.config import ConfigError, ConfigFieldError, Trust, TrustLike
from robo_orchard_core.utils.config.errors import Path
from robo_orchard_core.utils.config.formats import check_plain
from robo_orchard_lab.experiment.catalogue import ExperimentTrust, with_definitions
from robo_orchard_lab.experiment.document import ExperimentDocument, read_experiment
from robo_orchard_lab.experiment.overrides import Override, from_mapping, has_named_entries
from robo_orchard_lab.experiment.parts import CHECKPOINT, ExperimentFields
from robo_orchard_lab.experiment.prevalidation import check_renamed_fields, prevalidate

if TYPE_CHECKING:  # with torch
    from robo_orchard_lab.experiment.build import BuiltExperiment, LiveObjects


_TRAIN = ("data", "train")
T = TypeVar("T")


def _trust_of(trust: TrustLike) -> Trust:
    if isinstance(trust, Trust):
        return trust
    trusted = ExperimentTrust.of(trust)
    trusted.make_local_modules_importable()
    return trusted.trust


def _load(document: ExperimentDocument, load: Callable[[ExperimentDocument], T]) -> T:
    """Load a document, with overrides read as text where a field requires text."""
    refused: list[ConfigFieldError] = []
    while True:
        try:
            return load(document)
        except ConfigFieldError as error:
            for before in refused:  # text doesn't fit either: report the first error
                if before.path[: len(error.path)] == error.path:
                    raise document.locate(before) from before.__cause__
            as_text = document.with_text(error.path)
            if as_text is None:
                raise document.locate(error) from error.__cause__
            refused, document = [*refused, error], as_text
        except ConfigError as error:
            raise document.locate(error) from error.__cause__


class ExperimentConfig(ExperimentFields):
    """Complete training run: model, data, optimization, hooks and limits.

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

    In files, parts are mappings with ``class_type`` or ``func``.
    """

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, trust: TrustLike = ()) -> Self:
        """Build an experiment from plain data; short and public names of code are resolved.

        Args:
            document: Fields and their values.
            trust: Packages and classes that the document may name, in addition to the catalogue;
                a `Trust` replaces the catalogue.

        Raises:
            ConfigError: A value is invalid; the error has its path.
        """
        plain = check_plain(dict(document))
        assert isinstance(plain, dict)
        check_renamed_fields(plain)
        resolved = {key: with_definitions(value, (key,)) for key, value in plain.items()}
        if not isinstance(trust, Trust):
            trust = ExperimentTrust.of(trust, pyproject=False).trust
        return super().from_dict(resolved, trust=trust)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        trust: TrustLike = (),
        overrides: Mapping[str, Any] | Iterable[Override] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Load an experiment from a file and its base files.

        Args:
            path: YAML, TOML or JSON, by suffix.
            trust: Packages and classes that the file may name, in addition to the catalogue and
                to the trust table in the pyproject.toml of the current folder.
            overrides: Plain data by dotted path, which takes precedence over the file. To set
                configs of parts, use `replace`.
            environ: Environment variables, which take precedence over ``overrides``; none by
                default.

        Raises:
            ConfigError: The file can't be read or is invalid; the error has file, line and path.
        """
        given = from_mapping(overrides) if isinstance(overrides, Mapping) else overrides
        return cls.from_document(read_experiment(path, overrides=given, environ=environ), trust)

    @classmethod
    def from_document(
        cls, document: ExperimentDocument, trust: TrustLike = (), *, all_errors: bool = False
    ) -> Self:
        """Build an experiment from the result of `read_experiment`; ``trust`` is as in `load`.

        Errors that `check_document` finds are raised without an import. With ``all_errors``, they
        do not keep the other fields from being validated, which imports the trusted code that they
        name.

        An override such as ``--name 3`` is read as text if the field requires text.

        Raises:
            ConfigError: The document is invalid; the error has file, line and path, and the further
                errors of the document.
        """
        trust = _trust_of(trust)
        if not all_errors:
            cls.check_document(document, trust)
            return cls._validated(document, trust)
        try:
            prevalidate(document, trust)
        except ConfigFieldError as error:
            found = (error, *error.others)
            # Nothing of a document is imported that names untrusted code.
            if all(isinstance(each, ConfigFieldError) for each in found):
                error.others += cls._errors_elsewhere(document, trust, [e.path for e in found])
            raise
        return cls._validated(document, trust)

    @classmethod
    def check_document(cls, document: ExperimentDocument, trust: TrustLike = ()) -> None:
        """Check the result of `read_experiment` without importing the code that it names.

        Names and trust of code are checked, and all fields, except the arguments of classes and
        functions, and rules across fields.

        Raises:
            ConfigError: As in `from_document`.
        """
        trust = _trust_of(trust)
        found: list[ConfigError] = []
        try:
            prevalidate(document, trust)
        except ConfigError as error:
            found = [error, *error.others]
            if not all(each.path for each in found):  # malformed as a whole
                raise
        paths = [each.path for each in found]
        try:
            _load(document, lambda typed: cls.check_dict(typed.document, trust=trust))
        except ConfigError as error:
            for each in (error, *error.others):
                if not any(map(each.is_related_to, paths)):
                    found.append(each)
        if found:
            first, *others = found
            first.others = tuple(others)
            raise first

    @classmethod
    def _errors_elsewhere(
        cls, document: ExperimentDocument, trust: Trust, refused: Sequence[Path]
    ) -> tuple[ConfigError, ...]:
        """Return the errors of a document without its refused fields and named entries."""
        fields, removed = deepcopy(document.document), []
        for path in refused:
            holder: Any = fields
            smallest, length = fields, 1  # the innermost mapping of named entries around the value
            for depth, key in enumerate(path[:-1], start=1):
                holder = holder.get(key) if isinstance(holder, dict) else None
                if isinstance(holder, dict) and has_named_entries(path[:depth], holder):
                    smallest, length = holder, depth + 1
            removed.append(path[:length])
            smallest.pop(str(path[length - 1]), None)
            if path[0] == "optimizer" and length <= 2:
                removed.append(("lr_scheduler",))  # can't be checked without the optimizer
        try:
            cls._validated(replace(document, document=fields), trust)
        except ConfigError as error:
            return tuple(
                each
                for each in (error, *error.others)
                # Rules across fields, without a path, may depend on a refused field.
                if each.path and not any(map(each.is_related_to, removed))
            )
        return ()

    @classmethod
    def _validated(cls, document: ExperimentDocument, trust: Trust) -> Self:
        return _load(document, partial(cls._validated_as_typed, trust))

    @classmethod
    def _validated_as_typed(cls, trust: Trust, document: ExperimentDocument) -> Self:
        experiment = super().from_dict(document.document, trust=trust)
        vars(experiment)["document"] = document  # frozen, and not a field
        return experiment

    @cached_property
    def document(self) -> ExperimentDocument | None:
        """Document that the experiment was loaded from, with the origin of each value, or None."""
        return None

    def locate(self, owner: str, *setting: str | int) -> str:
        """Return the place of a setting of a hook, an optimizer, ... or ``data``, for messages.

        File and line, option or variable, and the dotted path.
        """
        field, _, name = owner.partition(".")  # such as lr_scheduler.g
        part: Path = ("hooks", owner)
        if field in (CHECKPOINT, "optimizer", "lr_scheduler"):
            part = (field, name) if name else (field,)
        elif owner == "data":
            part = _TRAIN
        path = (*part, *setting)
        error = ConfigError("", path)
        if self.document is not None:
            self.document.locate(error)
        option = f"--{error.location}"
        if error.source == f"command line: {option}":
            return option
        return f"{error.source}: {error.location}" if error.source else error.location

    def build(self, **live: Unpack[LiveObjects]) -> BuiltExperiment:
        """Build the trainer and the objects of the run, on every rank.

        Args:
            **live: Objects that replace described parts, see `build_experiment`.

        Raises:
            ConfigError: A part can't be built; the error has its path, and file and line.
            Exception: Errors of the described code and of the trainer.
        """
        from robo_orchard_lab.experiment.build import build_experiment

        with self.located():
            return build_experiment(self, self.locate, **live)

    @contextmanager
    def located(self) -> Iterator[None]:
        """Add file and line to the errors of the body."""
        try:
            yield
        except ConfigError as error:
            if self.document is None or error.source is not None:
                raise
            raise self.document.locate(error) from error.__cause__
