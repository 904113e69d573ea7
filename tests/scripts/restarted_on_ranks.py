"""Two trainings on each rank: one that nothing happens to, and one in which a rank fails.

Only in the launcher's first start, so that the second one goes on by itself to the end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fails_on_ranks

if __name__ == "__main__":
    folder, place, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    started_before = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    print(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", flush=True)
    fails_on_ranks.main(folder / "straight", "nowhere", options)
    fails_on_ranks.main(folder / "run", "nowhere" if started_before else place, options)
