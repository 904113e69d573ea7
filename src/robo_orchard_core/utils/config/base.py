"""`Config`: validated fields with a document in three formats."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from robo_orchard_core.utils.config import formats
from robo_orchard_core.utils.config.document import MAX_BYTES, check
from robo_orchard_core.utils.config.dotted_path import parsed_path
from robo_orchard_core.utils.config.encoding import encode
from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_core.utils.config.formats import Format
from robo_orchard_core.utils.config.loading import Loading, loading
from robo_orchard_core.utils.config.model import ConfigModel
from robo_orchard_core.utils.config.problems import config_error
from robo_orchard_core.utils.config.replacing import config_with
from robo_orchard_core.utils.config.trust import Trust, TrustLike


class Config(ConfigModel):
    """Validated fields that survive JSON, YAML and TOML exactly.

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

    Constructing one in code and assigning to a field raise pydantic's ValidationError, which is
    a ValueError. Everything that reads or writes documents, and `replace`, raises a
    `ConfigError`, which is one too and names the place. An assignment is validated alone;
    ``__post_init__`` runs at construction, `replace` and loading.
    """

    def to_dict(self) -> dict[str, Any]:
        """The document as plain data: what `from_dict` turns back into exactly this config.

        Raises:
            ConfigSaveError: A value would not come back exactly; its place is named.
        """
        return encode(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, trust: TrustLike = ()) -> Self:
        """The config that a document of plain data describes.

        Args:
            document: Fields and their values; ``config_type`` names a subclass.
            trust: Packages and classes that its references may reach, beside the default ones
                and the code that this class itself declares.

        Raises:
            ConfigError: Of the kind that says what is wrong, with the place.
        """
        plain = check(dict(document))
        try:
            with loading(Loading(cls, Trust.of(trust))):
                return cls.model_validate(plain)
        except ValidationError as error:
            raise config_error(error, plain) from error

    def to_str(self, format: Format = "json") -> str:  # noqa: A002 - the public word
        """The document as text.

        Raises:
            ConfigSaveError: A value would not come back exactly; its place is named.
        """
        return formats.write(encode(self, for_toml=format == "toml"), format)

    @classmethod
    def from_str(
        cls,
        text: str,
        format: Format = "json",  # noqa: A002 - the public word
        *,
        trust: TrustLike = (),
    ) -> Self:
        """The config that a text describes; `from_dict` says what ``trust`` means.

        Raises:
            ConfigError: Of the kind that says what is wrong, with the place.
        """
        return cls.from_dict(formats.read(text, format), trust=trust)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document to a file, in the format that its suffix says.

        What was there stays until the new document is whole and on the disk.

        Raises:
            ConfigSaveError: A value would not come back exactly; nothing was written.
        """
        text = self.to_str(formats.format_of(path))
        # The target of a link is replaced, not the link.
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
        """The config that a file describes; `from_dict` says what ``trust`` means.

        Raises:
            ConfigError: Of the kind that says what is wrong, with the file and the place.
            OSError: The file can't be read.
        """
        try:
            format_ = formats.format_of(path)
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
            return cls.from_str(formats.decoded(content), format_, trust=trust)
        except ConfigError as error:
            error.source = os.fspath(path)
            raise

    def replace(self, **changes: Any) -> Self:
        """A validated copy with other values; a dotted name reaches into what a field holds.

        >>> class Data(Config):
        ...     batch_size: int = 128
        >>> class Run(Config):
        ...     data: dict[str, Data] = {"train": Data()}
        >>> Run().replace(**{"data.train.batch_size": 4, "data.val": Data(batch_size=1)})
        Run(data={'train': Data(batch_size=4), 'val': Data(batch_size=1)})
        >>> Run().replace(**{"data.train": None})
        Run(data={})

        Args:
            **changes: Values by their names. Behind dots stand fields of configs, keys of mappings
                and indexes of lists; a key that holds a dot is written in double quotes. None
                removes the entry of a mapping whose values can't be None. All of them are
                changed at once, so that rules across fields hold for the result.

        Raises:
            ConfigFieldError: A name or a value that this config doesn't admit.
        """
        return config_with(self, {parsed_path(name): value for name, value in changes.items()})
