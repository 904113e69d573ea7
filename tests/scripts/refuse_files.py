"""Load untrusted files in one process and write each file's error.

Arguments: the output path and the address space limit in MiB (0: none); the input is a JSON list of
files. The first files trigger the imports of reading and validating.
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


def load(file: Path) -> dict[str, Any]:
    """Load a file and return its error, time, memory and imports."""
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
    """Return the peak memory of this process."""
    # getrusage would include the peak of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Read the files of the input in order."""
    if space := int(sys.argv[2]) * 2**20:
        # Exceeding this limit raises an untyped error.
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    files = [Path(file) for file in json.load(sys.stdin)]
    results = {str(file): load(file) for file in files}
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
