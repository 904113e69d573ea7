"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# A busy machine is not a failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Restore Ctrl-C: background processes ignore SIGINT, and so would their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
