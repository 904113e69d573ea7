"""Tests of the command ``doctor``, also with missing or broken packages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.cli.running import run

from robo_orchard_lab.cli.commands import doctor
from robo_orchard_lab.cli.commands.doctor import Requirement, install_command
from robo_orchard_lab.cli.main import main


def test_versions_and_devices_are_printed_as_json() -> None:
    """Exits with 0 if nothing is missing; the JSON has packages, extras and devices."""
    done = run("doctor", "--json")
    report = json.loads(done.out)
    assert (done.code, report["ok"], report["devices"][0]["device"]) == (0, True, "cpu")
    assert "torch" in {one["name"] for one in report["packages"] if one["ok"]}
    assert {"metrics", "terminal", "trackers", "vision"} <= set(report["extras"])
    assert "gloo" in report["distributed"]


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        (
            "raise OSError('libcudart.so.13: gone')",
            "OSError: libcudart.so.13: gone",
        ),
        ("import os; os.abort()", "the process that imported it exited with -6"),
    ],
)
def test_a_broken_torch_is_reported(torch: str, said: str, tmp_path: Path) -> None:
    """The exit code is 1 for a torch that cannot be imported, or that ends its process."""
    (tmp_path / "torch.py").write_text(torch)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run("doctor", variables={"PYTHONPATH": path})
    assert (done.code, done.err) == (1, "")
    assert f"torch can't be used: {said}" in done.out
    assert done.out.count("can't be used") == 1


def test_missing_packages_are_shown_with_an_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing requirement is a failure; a missing package of an extra is a suggestion."""
    old, new = Requirement("torch", ">=2.8", "2.5.1"), Requirement("rich", ">=13", None)
    there = Requirement("psutil", "", "7")
    assert (old.is_met, new.is_met, there.is_met) == (False, False, True)
    assert install_command([old, new]) == 'pip install "torch>=2.8" "rich>=13"'
    monkeypatch.setattr(doctor, "_probe", dict)
    extras = {"terminal": [new], "other": [there]}
    monkeypatch.setattr(doctor, "requirements", lambda: ([there], extras))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "INCOMPLETE EXTRA  INSTALL COMMAND" in shown
    assert 'terminal          pip install "rich>=13"\n' in shown
    monkeypatch.setattr(doctor, "requirements", lambda: ([old, there], extras))
    assert main(["doctor"]) == 1
    assert 'missing or incompatible: pip install "torch>=2.8"' in capsys.readouterr().out
