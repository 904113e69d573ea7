"""Commands of the pages about robot learning and rollouts, in the order of the pages."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.end_to_end.test_quick_start import commands
from tests.end_to_end.test_quick_start import variables as variables

pytest.importorskip("metaworld")

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 900


def blocks(page: str) -> list[str]:
    text = (ROOT / f"docs/how_to/{page}.md").read_text("utf-8")
    return re.findall(r"```bash\n(.*?)```", text, re.S)


@pytest.mark.slow
def test_the_commands_of_the_pages_train_and_roll_out_a_policy(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    """The commands record demonstrations, train a policy, measure its success and write a video."""
    folder = shutil.copytree(
        ROOT / "examples/metaworld",
        tmp_path / "metaworld",
        ignore=shutil.ignore_patterns("runs", "data", "__pycache__"),
    )
    demo, in_steps, *_ = blocks("robot_learning")
    assert commands(demo) == ["bash scripts/robot_demo.sh"]  # installs, then does the same
    install, enter, *rest = commands(in_steps)
    assert install.startswith("pip install")
    assert enter == "cd examples/metaworld"
    run_policy, saved_policy = blocks("rollouts")
    for line in [*rest, *commands(run_policy), *commands(saved_policy)]:
        if "rollout pretrained_model" in line:
            line = line.replace(
                "rollout pretrained_model", "rollout runs/pick_place/pretrained_model"
            )
        done = subprocess.run(
            shlex.split(line),
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        if " rollout " in line:
            assert re.search(r"^success \d+\.\d % \(.* of \d+ episodes", done.stdout, re.M)
    assert (folder / "out.mp4").stat().st_size > 1000
