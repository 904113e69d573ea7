"""Configs of a user's script and module, each in a separate process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DEFINITIONS = """
from typing import TypeVar

from robo_orchard_core.utils.config import ClassConfig, Config, ConfigInstanceOf

H = TypeVar("H")

class Hooks:
    pass

class HooksConfig(ClassConfig[H]):
    pass

class MyHook(Hooks):
    def __init__(self, cfg: "MyHookConfig"):
        self.cfg = cfg

class MyHookConfig(HooksConfig[MyHook]):
    class_type: type[MyHook] = MyHook
    log_step_freq: int = 5

class Run(Config):
    hook: ConfigInstanceOf[HooksConfig[Hooks]] = MyHookConfig()
"""

ROUND_TRIP = """
for suffix in ("json", "yaml", "toml"):
    for config in (MyHookConfig(log_step_freq=3), Run(hook=MyHookConfig(log_step_freq=3))):
        config.save(f"config.{suffix}")
        loaded = type(config).load(f"config.{suffix}")
        assert loaded == config, loaded
    assert loaded.hook.class_type is MyHook
    assert loaded.hook().cfg is loaded.hook
print("all came back")
"""


def run(script: Path) -> str:
    """Return the output of the script, run in its directory with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_script_reads_its_own_files_without_trust(tmp_path: Path, future: str) -> None:
    """Classes of `__main__` round-trip in every format without trust."""
    script = tmp_path / "train.py"
    script.write_text(future + DEFINITIONS + ROUND_TRIP)
    assert run(script) == "all came back\n"


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_imported_module_reads_its_own_files_without_trust(tmp_path: Path, future: str) -> None:
    """Classes of an imported module round-trip in every format without trust."""
    (tmp_path / "my_hooks.py").write_text(future + DEFINITIONS)
    script = tmp_path / "train.py"
    script.write_text("from my_hooks import *\n" + ROUND_TRIP)
    assert run(script) == "all came back\n"


def test_local_classes_need_no_trust(tmp_path: Path) -> None:
    """Classes defined inside a function round-trip without trust."""
    script = tmp_path / "train.py"
    body = textwrap.indent(DEFINITIONS + ROUND_TRIP, "    ")
    script.write_text(f"def main():\n{body}\nmain()\n")
    assert run(script) == "all came back\n"


def test_imported_script_reads_files_written_as_main(tmp_path: Path) -> None:
    """An evaluation script imports the training script and loads its file."""
    (tmp_path / "train.py").write_text(
        DEFINITIONS + "if __name__ == '__main__':\n    Run().save('run.yaml')\n"
    )
    evaluate = tmp_path / "evaluate.py"
    evaluate.write_text("import train\nassert train.Run.load('run.yaml') == train.Run()\n")
    run(tmp_path / "train.py")
    assert "__main__:MyHook" in (tmp_path / "run.yaml").read_text()
    run(evaluate)


def test_importing_core_loads_no_heavy_modules(tmp_path: Path) -> None:
    """The import loads neither torch nor accelerate, nor optional modules."""
    script = tmp_path / "check.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import robo_orchard_core
            import robo_orchard_core.utils.config
            import robo_orchard_core.utils.logging
            heavy = {"torch", "accelerate", "numpy", "yaml", "pydantic_settings", "argparse"}
            print(sorted(heavy & set(sys.modules)))
            """
        )
    )
    assert run(script) == "[]\n"
