"""Train a port on several ranks, uninterrupted and stopped twice; compare the final states."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from launching import end_group
from porting import assert_same, train

if __name__ == "__main__":
    port, folder = import_module(sys.argv[1]), Path(sys.argv[2])
    straight = train(port, folder / "straight")
    resumed = train(port, folder / "resumed", map(int, sys.argv[3:]))
    expected = port.state_of(straight, folder / "straight")
    assert_same(port.state_of(resumed, folder / "resumed"), expected)
    end_group()
