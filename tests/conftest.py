"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# A busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# As in a terminal. A process that a script has started in the background ignores it, and so would
# those that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
