"""Train a port on several ranks: in its plain loop, with the trainer, and stopped and resumed.

Arguments: module, folder, and precisions, each with a subfolder, for a port that accepts them and
has an experiment file, which is trained as well.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

from launching import end_group
from porting import check_file, check_port, in_precision

if __name__ == "__main__":
    name, folder, *precisions = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    port = import_module(name)
    if not precisions:
        check_port(port, Path(folder))
    for precision in precisions:
        PartialState(cpu=True)  # starts the process group, also for the plain loop
        adapted = in_precision(port, precision)
        check_port(adapted, Path(folder, precision))
        check_file(adapted, Path(folder, precision, "file"), precision)
        AcceleratorState._reset_state()  # keeps the process group
    end_group()
