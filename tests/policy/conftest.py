"""Fixture that resets Accelerate's process-wide state after each test."""

from tests.pipeline.conftest import fresh_accelerate_state as fresh_accelerate_state
