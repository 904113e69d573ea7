"""When a hook runs, as data.

A schedule is decided from the counters of the run alone, so that a resumed run fires where the
straight one would; only :class:`EverySeconds` looks at a clock, that of the first rank, and tells
the others. Registering a hook with a schedule binds it to the hook's channel.
"""

from robo_orchard_lab.pipeline.schedule.base import (
    STEP_CHANNELS,
    AnyOf,
    Due,
    Role,
    Schedule,
    ScheduleError,
    ScheduleField,
    as_schedule,
)
from robo_orchard_lab.pipeline.schedule.clock import EverySeconds
from robo_orchard_lab.pipeline.schedule.counted import (
    AtSteps,
    EveryEpochs,
    EveryOptimizerSteps,
    EverySteps,
    First,
    Last,
)

__all__ = [
    "STEP_CHANNELS",
    "AnyOf",
    "AtSteps",
    "Due",
    "EveryEpochs",
    "EveryOptimizerSteps",
    "EverySeconds",
    "EverySteps",
    "First",
    "Last",
    "Role",
    "Schedule",
    "ScheduleError",
    "ScheduleField",
    "as_schedule",
]
