"""Two trainings on each rank: one uninterrupted, and one in which a rank fails.

The rank fails in the launcher's first start only, so the second start completes the run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fails_on_ranks
from robo_orchard_lab.pipeline import init_process_group_after_restart

if __name__ == "__main__":
    init_process_group_after_restart()
    folder, place, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    started_before = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    print(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", flush=True)
    fails_on_ranks.main(folder / "straight", "nowhere", options)
    fails_on_ranks.main(folder / "run", "nowhere" if started_before else place, options)
