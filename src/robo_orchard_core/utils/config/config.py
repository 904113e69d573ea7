"""`Config`: validated fields, saved and loaded as JSON, YAML and TOML."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from robo_orchard_core.utils.config import formats
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    at_path,
    config_error,
    describe,
    parse_path,
    suggest_name,
    unknown_field,
)
from robo_orchard_core.utils.config.formats import MAX_BYTES, Format, check_plain
from robo_orchard_core.utils.config.model import ConfigModel, encode, field_values
from robo_orchard_core.utils.config.references import (
    Loading,
    Trust,
    TrustLike,
    item_type,
    loading,
    mapping_value_type,
)

ModelT = TypeVar("ModelT", bound=ConfigModel)
Keys = tuple[str, ...]


def config_with(config: ModelT, changes: Mapping[Keys, Any]) -> ModelT:
    """Return a validated copy with new values at some paths."""
    cls = type(config)
    values = copy.deepcopy(field_values(config))
    admits_any = cls.model_config.get("extra") == "allow"
    for name, inner in _grouped(changes):
        field = cls.model_fields.get(name)
        if field is None and name not in values and not admits_any:
            raise unknown_field(name, cls.model_fields, cls.__qualname__)
        old = values.get(name)
        if name not in values and field is not None:  # a sparse config
            old = copy.deepcopy(getattr(config, name))
        values[name] = _changed(old, inner, Any if field is None else field.annotation, name)
    if cls.is_sparse:
        _check_code(config, values)
    try:
        return cls(**values)
    except ValidationError as error:
        raise config_error(error, values) from error


def _check_code(config: ConfigModel, values: Mapping[str, Any]) -> None:
    """Refuse other code than a subclass, since the arguments belong to the old code."""
    for name in ("class_type", "func"):
        old, new = getattr(config, name, None), values.get(name)
        is_same = old is new or (
            isinstance(old, type) and isinstance(new, type) and issubclass(new, old)
        )
        if not is_same:
            raise ConfigFieldError(
                f"the other values are for {describe(old)}, and this is {describe(new)}; "
                "replace the entire config",
                (name,),
            )


def _grouped(changes: Mapping[Keys, Any]) -> Iterable[tuple[str, dict[Keys, Any]]]:
    """Group changes by their first keys."""
    found: dict[str, dict[Keys, Any]] = {}
    for (first, *rest), value in changes.items():
        found.setdefault(first, {})[tuple(rest)] = value
    return found.items()


def _changed(value: Any, changes: dict[Keys, Any], annotation: Any, key: str | int) -> Any:
    """Return the new or old value of a key, with changes inside applied."""
    value = changes.pop((), value)
    if not changes:
        return value
    with at_path(key):
        if isinstance(value, ConfigModel):
            return config_with(value, changes)
        if isinstance(value, dict):
            return _mapping_with(value, changes, mapping_value_type(annotation))
        if type(value) in (list, tuple):
            items = [*value]
            for name, inner in _grouped(changes):
                if not name.isdecimal() or int(name) >= len(items):
                    problem = f"expected the index of one of {len(items)} items"
                    raise ConfigFieldError(problem, (name,))
                index = int(name)
                items[index] = _changed(items[index], inner, item_type(annotation, index), index)
            return type(value)(items)
        found = type(value).__qualname__
        raise ConfigFieldError(f"holds no config, mapping or list but {found}; replace the value")


def _mapping_with(
    value: Mapping[Any, Any], changes: dict[Keys, Any], annotation: Any
) -> dict[Any, Any]:
    result = dict(value)
    keys = {str(key): key for key in value}
    for name, inner in _grouped(changes):
        key = keys.get(name, name)
        removes = inner == {(): None} and not _admits_none(annotation)
        if name not in keys and (removes or () not in inner):
            advice = suggest_name(name, [*keys], "there is")
            raise ConfigFieldError(f"no entry has this name; {advice}", (name,))
        if removes:
            del result[key]
        else:
            result[key] = _changed(value.get(key), inner, annotation, name)
    return result


def _admits_none(annotation: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(None)
    except ValidationError:
        return False
    return True


def _load(cls: type[ModelT], document: Mapping[str, Any], state: Loading) -> ModelT:
    plain = check_plain(dict(document))
    try:
        with loading(state):
            return cls.model_validate(plain)
    except ValidationError as error:
        raise config_error(error, plain) from error


class Config(ConfigModel):
    """Validated fields that round-trip exactly through JSON, YAML and TOML.

    >>> class Data(Config):
    ...     root: str
    ...     batch_size: int = 128
    >>> data = Data(root="images")
    >>> Data.from_str(data.to_str("toml"), "toml") == data
    True
    >>> data.replace(batch_size=4)
    Data(root='images', batch_size=4)
    >>> Data.from_str('{"root": "images", "bach_size": 4}')
    Traceback (most recent call last):
    robo_orchard_core.utils.config.errors.ConfigFieldError: bach_size: Data has no such field; \
did you mean 'batch_size'?

    Construction and assignment raise pydantic's ValidationError. Methods that read or write
    documents, and `replace`, raise `ConfigError` with the path. Both are ValueErrors.
    ``__post_init__`` runs at construction, `replace` and loading, but not at assignment.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the document as plain data for `from_dict`.

        Raises:
            ConfigSaveError: With the path of a value that would not be restored exactly.
        """
        return encode(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, trust: TrustLike = ()) -> Self:
        """Load a config from plain data.

        Args:
            document: Field values; ``config_type`` names a subclass.
            trust: Packages and classes that references may reach, in addition to this project's
                packages and code that this class declares.

        Raises:
            ConfigError: With the path of the problem.
        """
        return _load(cls, document, Loading(cls, Trust.of(trust)))

    @classmethod
    def check_dict(cls, document: Mapping[str, Any], *, trust: TrustLike = ()) -> None:
        """Check plain data as `from_dict` does, without an import of the code that it names.

        Parts, functions and rules across fields are not checked.

        Raises:
            ConfigError: With the path of the problem.
        """
        _load(cls, document, Loading(cls, Trust.of(trust), skips_parts=True))

    def to_str(self, format: Format = "json") -> str:  # noqa: A002 - the public word
        """Return the document as text; see `to_dict`."""
        return formats.write(encode(self, for_toml=format == "toml"), format)

    @classmethod
    def from_str(
        cls,
        text: str,
        format: Format = "json",  # noqa: A002 - the public word
        *,
        trust: TrustLike = (),
    ) -> Self:
        """Load a config from text; see `from_dict`."""
        return cls.from_dict(formats.read(text, format), trust=trust)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document to a file, in the format of the suffix.

        The file is replaced atomically, after the new document is on the disk.

        Raises:
            ConfigSaveError: A value would not be restored exactly; nothing was written.
        """
        text = self.to_str(formats.format_of(path))
        # Replace the target of a link, not the link.
        target = Path(os.path.realpath(path))
        draft = target.with_name(f".{target.name}.{os.urandom(8).hex()}.tmp")
        try:
            with open(draft, "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, draft)
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trust: TrustLike = ()) -> Self:
        """Load a config from a file; for ``trust``, see `from_dict`.

        Raises:
            ConfigError: With the file and the path of the problem.
            OSError: The file can't be read.
        """
        try:
            format_ = formats.format_of(path)
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
            return cls.from_str(formats.decode_utf8(content), format_, trust=trust)
        except ConfigError as error:
            error.source = os.fspath(path)
            raise

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with new values; dotted names reach into nested values.

        >>> class Data(Config):
        ...     batch_size: int = 128
        >>> class Run(Config):
        ...     data: dict[str, Data] = {"train": Data()}
        >>> Run().replace(**{"data.train.batch_size": 4, "data.val": Data(batch_size=1)})
        Run(data={'train': Data(batch_size=4), 'val': Data(batch_size=1)})
        >>> Run().replace(**{"data.train": None})
        Run(data={})

        Args:
            **changes: Values by dotted name: fields of configs, keys of mappings, indexes of lists.
                A key with a dot is written in double quotes. None removes an entry of a mapping
                whose values can't be None. Rules across fields are checked on the result.

        Raises:
            ConfigFieldError: A name doesn't exist, or a value is invalid.
        """
        return config_with(self, {parse_path(name): value for name, value in changes.items()})
