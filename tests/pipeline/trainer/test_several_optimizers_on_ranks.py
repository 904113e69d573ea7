"""Several optimizers on two ranks: gradients, buffers, checkpoints, and ranks that disagree."""

from __future__ import annotations

import json
from pathlib import Path

from launching import SCRIPTS, launch

SCRIPT = SCRIPTS / "optimizers_on_ranks.py"


def test_two_ranks_equal_a_plain_loop(tmp_path: Path) -> None:
    """Both forms train like a plain loop that averages gradients, also resumed and with padding.

    Ranks start from different weights; a parameter is used on one rank only, another on none. A
    model in DDP, a sharded model and unequal learning rates are refused.
    """
    launch(SCRIPT, tmp_path, "train")
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found.pop("updates") == {"g": 2, "d": 2}
        assert {"loss/g", "loss/d", "grad_norm/g", "grad_norm/d"} <= {*found.pop("seen")}
        assert len(found) == 9
        assert {name: different for name, different in found.items() if different} == {}


def test_ranks_with_losses_for_different_optimizers_end_the_run(tmp_path: Path) -> None:
    """The error on all ranks states the loss of each rank; nothing hangs."""
    failed = launch(SCRIPT, tmp_path, "names", fails=True, timeout_s=60)
    expected = "found: rank 0 has a loss for 'g'; rank 1 has the end of its step; choose"
    assert expected in failed.stderr
    assert "step 3 (epoch 1" in failed.stderr
