"""Machine and versions of a measurement."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe(distributions: Sequence[str]) -> dict[str, str]:
    """Return the machine, Python, and the versions of the distributions if installed."""
    found = {
        "CPU": f"{_cpu_model()} ({os.cpu_count()} cores)",
        "Python": platform.python_version(),
    }
    for distribution in distributions:
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
