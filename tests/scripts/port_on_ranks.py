"""Train a port on several ranks: in its plain loop, with the trainer, and stopped and resumed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch

from launching import end_group
from porting import check_port

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    check_port(import_module(name), Path(folder))
    end_group()
