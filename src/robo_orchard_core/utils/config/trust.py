"""Which code a configuration file may name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

TrustLike: TypeAlias = "Trust | str | type | Iterable[str | type]"


def is_dotted_name(name: str) -> bool:
    """Whether it is written like the name of a module or a qualified name."""
    return all(part.isidentifier() for part in name.split("."))


@dataclass(frozen=True)
class Trust:
    """The code that references in a file may reach.

    Attributes:
        packages: Dotted names; each covers itself and everything beneath it, so ``torch``
            covers ``torch.optim`` and not ``torchevil``.
        classes: Single classes, written ``module:QualName``; nothing else of their module.

    >>> trust = Trust().widened("my_team.models", "torch.optim.sgd:SGD")
    >>> trust.covers("my_team.models.resnet", "ResNet"), trust.covers("my_team", "Other")
    (True, False)
    >>> trust.covers("torch.optim.sgd", "SGD"), trust.covers("torch.optim.adam", "Adam")
    (True, False)
    """

    packages: frozenset[str] = frozenset({"robo_orchard_core", "robo_orchard_lab"})
    classes: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in (*self.packages, *self.classes):
            parts = name.split(":") if name in self.classes else [name]
            if len(parts) != 1 + (name in self.classes) or not all(map(is_dotted_name, parts)):
                raise ValueError(
                    "expected the name of a package to trust, like 'my_team.models', or of a "
                    f"class, like 'my_team.models:Net'; found {name!r}"
                )

    def widened(self, *names: str | type) -> Trust:
        """This trust and the named packages and classes as well.

        Raises:
            ValueError: A name that is neither a dotted name nor ``module:QualName``.
        """
        texts = [n if isinstance(n, str) else f"{n.__module__}:{n.__qualname__}" for n in names]
        return Trust(
            packages=self.packages.union(n for n in texts if ":" not in n),
            classes=self.classes.union(n for n in texts if ":" in n),
        )

    @classmethod
    def of(cls, more: TrustLike) -> Trust:
        """The default trust widened by ``more``; a `Trust` stands for itself."""
        if isinstance(more, Trust):
            return more
        return cls().widened(*([more] if isinstance(more, str | type) else more))

    def covers(self, module: str, qualname: str) -> bool:
        """Whether a file may name ``module:qualname``."""
        parts = module.split(".")
        prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
        return not prefixes.isdisjoint(self.packages) or f"{module}:{qualname}" in self.classes
