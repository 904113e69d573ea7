"""Inventories of other projects for intersphinx, from text files in the repository.

A file ``NAME.txt`` has the address of the project's documents in the first line, and an object in
each further line: name, kind (``py:class``) and the page with its anchor; ``$`` is the name.
"""

from __future__ import annotations

import zlib
from pathlib import Path


def mapping(sources: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """Write each text file as an inventory into ``folder``; return intersphinx's mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for source in sorted(sources.glob("*.txt")):
        address, *lines = source.read_text("utf-8").splitlines()
        objects = []
        for line in lines:
            name, kind, page = line.split()
            objects.append(f"{name} {kind} 1 {page} -\n")
        head = f"# Sphinx inventory version 2\n# Project: {source.stem}\n# Version:\n"
        head += "# The remainder of this file is compressed using zlib.\n"
        file = folder / f"{source.stem}.inv"
        file.write_bytes(head.encode() + zlib.compress("".join(objects).encode()))
        found[source.stem] = (address, str(file))
    return found
