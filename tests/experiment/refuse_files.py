"""A process that is sent files by a stranger, and tells what it refused each with.

Called with where the tale goes, the packages that are trusted, and, in JSON on its input, the
files. The first ones are harmless, and bring in all that reading imports.
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
from robo_orchard_lab.experiment.document import read_experiment
from robo_orchard_lab.experiment.screening import screen
from robo_orchard_lab.experiment.trust_settings import ExperimentTrust

TRUST = ExperimentTrust(("trusted_parts",)).trust


def told(file: Path) -> dict[str, Any]:
    """What becomes of a file."""
    os.chdir(file.parent)
    modules, began = set(sys.modules), time.perf_counter()
    error: BaseException | None = None
    try:
        screen(read_experiment(file.name), TRUST)
    except BaseException as caught:
        error = caught
    return {
        "seconds": time.perf_counter() - began,
        "imported": sorted(set(sys.modules) - modules),
        "error": type(error).__qualname__,
        "is_typed": isinstance(error, ConfigError),
        "text": str(error),
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """The most memory that this process has had."""
    # getrusage would tell that of the process which has started this one, if that was more.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Read the files of the input, one after the other."""
    # Whatever a file makes us ask for beyond this is refused, and ends in no typed error.
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    files = [Path(file) for file in json.load(sys.stdin)]
    tale = {str(file): told(file) for file in files}
    Path(sys.argv[1]).write_text(json.dumps(tale))


if __name__ == "__main__":
    main()
