"""How the data of a job is divided among its processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part in a job's data."""

    processes: int = 1
    rank: int = 0
    even: bool = True
    """Whether each has as many batches, all of them full, by repeating the first samples."""
    split: bool = False
    """Whether each batch is cut into one for each process; else whole ones are dealt out."""
