"""The processes of a job, which end together when one of them fails."""

from robo_orchard_lab.pipeline.peers.ending import before_hard_end, leave_group_at_exit
from robo_orchard_lab.pipeline.peers.failures import (
    failed_elsewhere,
    failure_of,
    killed,
    plain_text,
)
from robo_orchard_lab.pipeline.peers.restarts import leave_addresses_behind
from robo_orchard_lab.pipeline.peers.sections import (
    another_failed,
    end_together,
    failing,
    meet_others,
)
from robo_orchard_lab.pipeline.peers.stall_clock import StallClock
from robo_orchard_lab.pipeline.peers.strays import Place

__all__ = [
    "Place",
    "StallClock",
    "another_failed",
    "before_hard_end",
    "end_together",
    "failed_elsewhere",
    "failing",
    "failure_of",
    "killed",
    "leave_addresses_behind",
    "leave_group_at_exit",
    "meet_others",
    "plain_text",
]
