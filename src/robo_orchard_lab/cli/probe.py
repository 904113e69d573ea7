"""What torch says of itself and of the machine, as JSON: a process of its own, since a broken torch
may end the one that imports it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from time import perf_counter
from typing import Any


def main() -> None:
    """Print a line of JSON for each thing that is found out."""
    for tell in (_torch, _devices, _distributed, _accelerate):
        result = _result_of(tell)
        print(json.dumps({tell.__name__.removeprefix("_"): result}), flush=True)
        if tell is _torch and "error" in result:
            break  # the others need it


def _result_of(tell: Callable[[], Any]) -> Any:
    try:
        return tell()
    except BaseException as error:  # whatever a broken installation raises
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__qualname__}: {lines[0] if lines else ''}"}


def _torch() -> dict[str, Any]:
    began_at = perf_counter()
    import torch

    return {
        "version": torch.__version__,
        "import_s": round(perf_counter() - began_at, 2),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu", "name": f"{os.cpu_count()} cores"}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": about.name,
                    "memory_gib": round(about.total_memory / 2**30, 1),
                    "bf16": about.major >= 8 or torch.version.hip is not None,
                }
            )
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        found += [
            {"device": f"{kind}:{index}", "name": ""}
            for index in range(torch.accelerator.device_count())
        ]
    return found


def _distributed() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    asked = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    asked |= {"mpi": dist.is_mpi_available, "ucc": dist.is_ucc_available}
    return [name for name, is_available in asked.items() if is_available()]


def _accelerate() -> str:
    import accelerate

    return str(accelerate.__version__)


if __name__ == "__main__":
    main()
