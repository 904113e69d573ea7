"""A stranger's file is refused for what it is, at once, and nothing comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.experiment.hostile.corpus import Hostile, experiment
from tests.experiment.hostile.files import FILES
from tests.experiment.hostile.names import NAMES
from tests.experiment.hostile.texts import JSON_AND_TOML, YAML

BEFORE_IMPORT = [*YAML, *JSON_AND_TOML, *NAMES, *FILES]

SECONDS = 1.0
MIB = 200

TRUSTED = """
raise SystemExit("a package was imported for a file that is refused by its names alone")
"""


def contents(root: Path) -> dict[str, tuple[int, bytes | str]]:
    """Every file, folder, link and pipe below a folder."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        held = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        )
        found[str(path.relative_to(root))] = (mode, held)
    return found


def tell(root: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """What became of each file, in a process of its own."""
    packages = root.parent / "packages"
    packages.mkdir()
    (packages / "trusted_parts.py").write_text(TRUSTED)
    tale = root.parent / "tale.json"
    path = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(packages)])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("refuse_files.py")), str(tale)],
        input=json.dumps([str(file) for file in files]),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    found: dict[str, dict[str, Any]] = json.loads(tale.read_text())
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files, by their names, and what became of each."""
    root = tmp_path_factory.mktemp("hostile") / "files"
    root.mkdir()
    harmless = [
        Hostile("harmless_yaml", "", experiment(), "", ""),
        Hostile("harmless_json", "", '{"name": "x"}', "", "", "json"),
        Hostile("harmless_toml", "", "name = 'x'", "", "", "toml"),
    ]
    files = {each.name: each.write(root) for each in [*harmless, *BEFORE_IMPORT]}
    before = contents(root)
    tale = tell(root, [*files.values()])
    assert contents(root) == before, "a file had something written"
    assert tale[str(files["harmless_yaml"])]["error"] == "NoneType"
    return files, tale


def test_the_corpus_is_one() -> None:
    """There are enough of them, with names of their own."""
    assert len(BEFORE_IMPORT) >= 70
    assert Counter(each.name for each in BEFORE_IMPORT).most_common(1)[0][1] == 1


@pytest.mark.parametrize("hostile", BEFORE_IMPORT, ids=lambda each: each.name)
def test_it_is_refused_ahead_of_the_first_import(
    corpus: tuple[dict[str, Path], dict[str, Any]], hostile: Hostile
) -> None:
    """With a typed error that says where and what, in under a second and in little memory."""
    files, tale = corpus
    told = tale[str(files[hostile.name])]
    assert told["is_typed"], told
    assert told["error"] == hostile.error, told
    assert hostile.says in told["text"], told
    assert told["text"].startswith(f"{files[hostile.name].name}") or hostile.beside, told
    assert told["imported"] == []
    assert told["seconds"] < SECONDS
    assert told["peak_mib"] < MIB  # of the process, with all files ahead of this one
    assert len(told["text"]) < 600
    assert told["text"].isprintable()
