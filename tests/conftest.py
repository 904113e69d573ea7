"""Settings of all tests."""

from __future__ import annotations

import os
import signal
import sys
import threading

from hypothesis import HealthCheck, settings

# A busy machine is not a failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Restore Ctrl-C: background processes ignore SIGINT, and so would their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop_tracing() -> None:
    sys.settrace(None)
    threading.settrace(None)  # for new threads


# A data worker that is forked while a background thread holds coverage's lock would wait for ever.
# Coverage of these workers is lost anyway: they end without writing it.
os.register_at_fork(after_in_child=_stop_tracing)
