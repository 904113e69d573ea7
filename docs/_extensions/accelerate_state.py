"""Reset of Accelerate between the tutorials, which run in one process."""

from __future__ import annotations

from accelerate.state import AcceleratorState, GradientState


def reset(gallery_conf: object, fname: str) -> None:
    """Forget devices, precision and accumulation of the tutorial before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
