"""Hostile experiment: a file, and optionally other files in its folder."""

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
    """A harmless experiment in YAML, with other values of some fields, and further lines."""
    fields = {name: text for name, text in (PARTS | changes).items() if text is not None}
    return "".join(f"{name}: {text}\n" for name, text in fields.items()) + extra


def model(reference: str, key: str = "class_type") -> str:
    """An experiment that names something as its model."""
    return experiment(model=f"{{{key}: {reference}}}")


def with_hook(text: str) -> str:
    """An experiment with one hook."""
    return experiment(hooks=f"{{hook: {text}}}")


@dataclass(frozen=True)
class Hostile:
    """One of them.

    Attributes:
        name: What it is called, also the name of its folder.
        tries: What would happen if it were believed.
        content: Of its file.
        error: The class of the error that refuses it.
        says: What is in the message.
        suffix: Of its file.
        siblings: Other files in its folder, by name.
        links: Links in its folder, by name, and where they lead.
        pipes: Named pipes in its folder.
        folders: Folders in its folder.
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
        """Its file, in a folder of its own."""
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
