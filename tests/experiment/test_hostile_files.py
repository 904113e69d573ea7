"""Hostile files are refused at once, without side effects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from tests.experiment.hostile.corpus import Hostile, model, with_hook
from tests.experiment.hostile.files import FILES
from tests.experiment.hostile.names import NAMES
from tests.experiment.hostile.texts import JSON_AND_TOML, YAML
from tests.experiment.hostile.when_validated import WHEN_VALIDATED

from launching import SCRIPTS

BEFORE_IMPORT = [*YAML, *JSON_AND_TOML, *NAMES, *FILES]

SECONDS = 1.0
MIB = 200

TRUSTED = Path(__file__).parent / "hostile" / "trusted_parts.py"

WARMING_UP = [
    Hostile("harmless_yaml", "", "name: x\n", "", ""),
    Hostile("harmless_json", "", '{"name": "x"}', "", "", "json"),
    Hostile("harmless_toml", "", "name = 'x'", "", "", "toml"),
]

BROKEN = "raise RuntimeError('this was imported')\n"

# Imports torchmetrics as well, which is slower than all files together.
ALL_OF_IT = "{class_type: MetricTracker, metrics: {a: {class_type: torchmetrics:MeanMetric}}}"

Reports: TypeAlias = dict[str, dict[str, Any]]


def contents(root: Path) -> dict[str, tuple[int, bytes | str]]:
    """Return every file, folder, link and pipe below a folder."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        held = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        )
        found[str(path.relative_to(root))] = (mode, held)
    return found


def read_all(
    all_of_them: list[Hostile], folder: Path, *, trusted: str, space_mib: int = 0
) -> Reports:
    """Load files in a separate process, check for side effects, and return the reports by name.

    Args:
        all_of_them: Files in order.
        folder: Empty folder.
        trusted: Source of the trusted package.
        space_mib: Limit of the address space in MiB; 0 is unlimited.
    """
    files, packages = folder / "files", folder / "packages"
    for each in (files, packages):
        each.mkdir()
    (packages / "trusted_parts.py").write_text(trusted)
    (packages / "trusted_broken.py").write_text(BROKEN)
    paths = {each.name: each.write(files) for each in all_of_them}
    before = contents(files)
    path = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(packages)]
    done = subprocess.run(
        [
            sys.executable,
            SCRIPTS / "refuse_files.py",
            folder / "results",
            str(space_mib),
        ],
        input=json.dumps([str(file) for file in paths.values()]),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRACE": str(folder / "trace"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert contents(files) == before, "something was written"
    assert not (folder / "trace").exists(), f"called: {(folder / 'trace').read_text()}"
    results = json.loads((folder / "results").read_text())
    return {name: results[str(file)] for name, file in paths.items()}


def check_refused(hostile: Hostile, report: dict[str, Any]) -> None:
    """Check that the refusal is typed, quick and at most a few printable lines."""
    assert report["is_typed"], report["text"]
    assert any(text in report["text"] for text in hostile.says.split("|"))
    assert report["error"] == hostile.error, report["text"]
    assert report["text"].startswith("experiment.") or hostile.siblings
    assert report["seconds"] < SECONDS
    assert all(line.isprintable() for line in report["text"].splitlines())
    assert len(report["text"].splitlines()[0]) < 600


@pytest.fixture(scope="module")
def before_import(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Reports of files refused by name; any import of a trusted package fails."""
    return read_all(
        [*WARMING_UP, *BEFORE_IMPORT],
        tmp_path_factory.mktemp("before_import"),
        trusted=BROKEN,
        space_mib=1024,
    )


@pytest.fixture(scope="module")
def when_validated(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Reports of files validated against their trusted parts."""
    harmless = [
        Hostile("harmless", "", with_hook(ALL_OF_IT), "", ""),
        Hostile("harmless_parts", "", model("trusted_parts:Net, width: 1"), "", ""),
    ]
    report = read_all(
        [*harmless, *WHEN_VALIDATED],
        tmp_path_factory.mktemp("when_validated"),
        trusted=TRUSTED.read_text(),
    )
    assert all(report[each.name]["error"] == "NoneType" for each in harmless), report
    return report


def test_corpus_has_unique_names() -> None:
    """The corpus is large enough and its names are unique."""
    everything = [*BEFORE_IMPORT, *WHEN_VALIDATED]
    assert len(everything) >= 70
    assert Counter(each.name for each in everything).most_common(1)[0][1] == 1


@pytest.mark.parametrize("hostile", BEFORE_IMPORT, ids=lambda each: each.name)
def test_hostile_file_is_refused_before_import(before_import: Reports, hostile: Hostile) -> None:
    """A typed error names place and problem in under a second and with little memory."""
    report = before_import[hostile.name]
    check_refused(hostile, report)
    assert report["imported"] == []
    assert not report["has_torch"]
    assert report["peak_mib"] < MIB  # peak of the process, over this file and all earlier files


@pytest.mark.parametrize("hostile", WHEN_VALIDATED, ids=lambda each: each.name)
def test_hostile_file_is_refused_without_a_call(when_validated: Reports, hostile: Hostile) -> None:
    """Trusted names are imported and inspected, but neither called nor built."""
    report = when_validated[hostile.name]
    check_refused(hostile, report)
    assert report["more_mib"] < MIB
