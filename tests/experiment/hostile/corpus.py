"""Hostile experiment files, optionally with other files in the folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PARTS = {
    "name": "hostile",
    "model": "{class_type: MLP, inputs: 2, hidden: [4], outputs: 3}",
    "data": "{train: {dataset: {class_type: Spirals, size: 8}, batch_size: 4}}",
    "batch_processor": (
        "{class_type: SupervisedProcessor, loss: {class_type: torch.nn:CrossEntropyLoss}}"
    ),
    "optimizer": "{class_type: torch.optim:SGD, lr: 0.1}",
    "trainer": "{max_epoch: 1}",
}


def experiment(extra: str = "", **changes: str | None) -> str:
    """Return a harmless YAML experiment with changed fields and further lines."""
    fields = {name: text for name, text in (PARTS | changes).items() if text is not None}
    return "".join(f"{name}: {text}\n" for name, text in fields.items()) + extra


def model(reference: str, key: str = "class_type") -> str:
    """Return an experiment with a given reference as its model."""
    return experiment(model=f"{{{key}: {reference}}}")


def with_hook(text: str) -> str:
    """Return an experiment with one hook."""
    return experiment(hooks=f"{{hook: {text}}}")


@dataclass(frozen=True)
class Hostile:
    """Hostile experiment file with its expected error.

    Attributes:
        name: Name of the case and its folder.
        tries: Effect of the file if trusted.
        content: Content of the file.
        error: Class of the expected error.
        says: Expected part of the message.
        suffix: Suffix of the file.
        siblings: Other files in the folder, by name.
        links: Targets of links in the folder, by name.
        pipes: Named pipes in the folder.
        folders: Subfolders of the folder.
    """

    name: str
    tries: str
    content: str | bytes
    error: str
    says: str
    suffix: str = "yaml"
    siblings: Mapping[str, str | bytes] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    pipes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def write(self, root: Path) -> Path:
        """Write the file to its own folder."""
        folder = root / self.name
        folder.mkdir()
        for name in self.folders:
            (folder / name).mkdir()
        file = folder / f"experiment.{self.suffix}"
        for path, content in {file: self.content, **self._sibling_files(folder)}.items():
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for name, target in self.links.items():
            if name == file.name:
                file.unlink()
            (folder / name).symlink_to(target)
        for name in self.pipes:
            os.mkfifo(folder / name)
        return file

    def _sibling_files(self, folder: Path) -> dict[Path, str | bytes]:
        return {folder / name: content for name, content in self.siblings.items()}


SYNTAX = "ConfigSyntaxError"
FIELD = "ConfigFieldError"
REFERENCE = "ConfigReferenceError"
TRUST = "TrustError"
ANY = "ConfigError"
