"""Size of a distribution's installation:

`python -m benchmarks.installed NAME...`, as JSON. The requirements are read from the current
environment. `NAME[EXTRA]` includes the extra's requirements. Torch and its requirements are
excluded.
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main() -> None:
    torch = needed_by(Requirement("torch"))
    document: dict[str, dict[str, Any]] = {}
    for text in sys.argv[1:]:
        try:
            brought = needed_by(Requirement(text)) - torch
        except PackageNotFoundError as error:
            document[text] = {"missing": str(error)}
        else:
            sizes = {name: size_of(distribution(name)) for name in sorted(brought)}
            document[text] = {"distributions": sizes}
    print(json.dumps(document))


def needed_by(requirement: Requirement) -> set[str]:
    """Return the names of the distributions that a requirement installs, its own included.

    Raises:
        PackageNotFoundError: The distribution or one of its requirements is not installed.
    """
    found: set[tuple[str, str]] = set()
    open_ones = list(_named(requirement))
    while open_ones:
        name, extra = open_ones.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for text in distribution(name).requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                open_ones += _named(needed)
    return {name for name, _ in found}


def _named(requirement: Requirement) -> Iterator[tuple[str, str]]:
    name = canonicalize_name(requirement.name)
    yield name, ""
    for extra in requirement.extras:
        yield name, extra


def size_of(found: Distribution) -> int:
    """Return the bytes of a distribution's files without compiled modules; of its source if
    editable.
    """
    files: list[Any] = [Path(str(file.locate())) for file in found.files or ()]
    files = [file for file in files if file.suffix != ".pyc"]
    at_top = [file for file in found.files or () if len(file.parts) == 1]
    for listed in [file for file in at_top if file.suffix == ".pth"]:
        source = Path(listed.read_text(encoding="utf-8").strip())
        if source.is_dir():
            files += [file for file in source.rglob("*") if file.suffix != ".pyc"]
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    main()
