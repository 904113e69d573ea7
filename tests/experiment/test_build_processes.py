"""Building an experiment on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

from launching import SCRIPTS, launch

SCRIPT = SCRIPTS / "build_on_ranks.py"


def test_ranks_build_one_run_and_fail_together(tmp_path: Path) -> None:
    """Two ranks train as the script does, and a build error on one rank ends both."""
    done = launch(SCRIPT, tmp_path, fails=True, timeout_s=120)
    first, second = (
        json.loads((tmp_path / f"rank{rank}.json").read_text("utf-8")) for rank in range(2)
    )
    assert first == second
    assert first["same"]
    assert first["moves"] == [6, 6]
    assert first["updates"] == 6
    assert first["exchanged_at"] == [4, 8]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"metrics.jsonl", "checkpoints", "run_state.json"} <= written
    assert "data.train.dataset: FileNotFoundError: no such folder: 'images'" in done.stderr
    assert "rank 0 failed first: ConfigBuildError" in done.stderr
