"""Test kit for hooks and trainings.

- `run_hook`: run a hook on a tiny model; inspect events, requests, metrics and weights.
- `assert_state_round_trip`, `assert_weights_unchanged`, `assert_no_device_sync`: assertions.
- `count_host_reads`, `count_collectives`: record device syncs and collectives.
- `prove_resume`: prove that a training resumes exactly after stops and kills.
"""

from robo_orchard_lab.testing.assertions import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from robo_orchard_lab.testing.counting import Place, TracedCall, count_collectives, count_host_reads
from robo_orchard_lab.testing.fixtures import HookSource, RunSetting
from robo_orchard_lab.testing.resume_proof import ResumeProof, StraightRunError, prove_resume
from robo_orchard_lab.testing.run import Event, HookRun, MadeRequest, run_hook
from robo_orchard_lab.testing.run_record import ResumeDifference

__all__ = [
    "Event",
    "HookRun",
    "HookSource",
    "MadeRequest",
    "Place",
    "ResumeDifference",
    "ResumeProof",
    "RunSetting",
    "StraightRunError",
    "TracedCall",
    "assert_no_device_sync",
    "assert_state_round_trip",
    "assert_weights_unchanged",
    "count_collectives",
    "count_host_reads",
    "prove_resume",
    "run_hook",
]
