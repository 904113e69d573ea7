"""Testing your own hooks: run them on a tiny model, and look at what they did."""

from robo_orchard_lab.testing.assertions import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from robo_orchard_lab.testing.counting import Place, TracedCall, count_collectives, count_host_reads
from robo_orchard_lab.testing.fixtures import HookSource, RunSetting
from robo_orchard_lab.testing.recorder import Event, MadeRequest
from robo_orchard_lab.testing.resume.proof_runs import StraightRunError
from robo_orchard_lab.testing.resume.record_differences import ResumeDifference
from robo_orchard_lab.testing.resume.resume_proof import ResumeProof, prove_resume
from robo_orchard_lab.testing.run import HookRun, run_hook

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
