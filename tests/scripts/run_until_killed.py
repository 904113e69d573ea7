"""A slow run that logs each step, for tests that read its folder; the test ends it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from robo_orchard_lab.pipeline import PipelineHooks
from run_folders import train

if __name__ == "__main__":
    slow = PipelineHooks("slow")
    slow.on_step.before(lambda args: time.sleep(0.05))
    train(Path(sys.argv[1]), hooks={"slow": slow}, max_epoch=100_000)
