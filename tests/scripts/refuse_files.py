"""A process that is sent files by a stranger, and tells what it refused each with.

Called with where the tale goes, how much address space it may have (MiB; 0: any), and, in JSON on
its input, the files. Those that come first bring in what reading, or validating, imports.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_lab.experiment import ExperimentConfig

TRUST = ("trusted_parts", "trusted_broken")


def told(file: Path) -> dict[str, Any]:
    """What becomes of a file."""
    os.chdir(file.parent)
    modules, began, peak = set(sys.modules), time.perf_counter(), peak_mib()
    error: BaseException | None = None
    try:
        ExperimentConfig.load(file.name, trust=TRUST)
    except BaseException as caught:
        error = caught
    return {
        "seconds": time.perf_counter() - began,
        "imported": sorted(set(sys.modules) - modules),
        "has_torch": "torch" in sys.modules,
        "error": type(error).__qualname__,
        "is_typed": isinstance(error, ConfigError),
        "text": str(error),
        "peak_mib": peak_mib(),
        "more_mib": peak_mib() - peak,
    }


def peak_mib() -> float:
    """The most memory that this process has had."""
    # getrusage would tell that of the process which has started this one, if that was more.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Read the files of the input, one after the other."""
    if space := int(sys.argv[2]) * 2**20:
        # What a file makes us ask for beyond this fails, and so is no typed error.
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    files = [Path(file) for file in json.load(sys.stdin)]
    tale = {str(file): told(file) for file in files}
    Path(sys.argv[1]).write_text(json.dumps(tale))


if __name__ == "__main__":
    main()
