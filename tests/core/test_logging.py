"""Log lines contain the rank; handlers are installed only on request."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from robo_orchard_core.utils.logging import log_basic_config

SETUP = """
import io, logging, sys
from robo_orchard_lab.utils import log_basic_config
log = logging.getLogger("my.module")
"""


def stderr_of(code: str, **environment: str) -> str:
    """Return the standard error of a new interpreter."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SETUP + code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_importing_installs_no_handler() -> None:
    """Only the call changes the root logger."""
    code = "assert not logging.getLogger().handlers; assert not log.isEnabledFor(logging.INFO)"
    assert stderr_of(code) == ""


def test_single_process_shows_no_rank() -> None:
    """A line has time, level, logger and message."""
    text = stderr_of("log_basic_config(); log.info('hello'); log.debug('hidden')")
    assert text.endswith(" INFO my.module: hello\n")
    assert "rank" not in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("environment", [{"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "two"}])
def test_world_size_one_shows_no_rank(environment: dict[str, str]) -> None:
    """A launcher of one process, or invalid variables, change nothing."""
    assert "rank" not in stderr_of("log_basic_config(); log.info('hello')", **environment)


def test_lines_begin_with_rank_and_world_size() -> None:
    """Each line begins with rank and world size."""
    text = stderr_of("log_basic_config(); log.info('hello')", RANK="0", WORLD_SIZE="4")
    assert text.startswith("[rank 0/4] ")


def test_ranks_above_zero_write_only_warnings_by_default() -> None:
    """Four processes don't repeat every line four times."""
    code = "log_basic_config(all_ranks={}); log.info('hello'); log.warning('careful')"
    quiet = stderr_of(code.format(False), RANK="3", WORLD_SIZE="4")
    assert "hello" not in quiet
    assert quiet.startswith("[rank 3/4] ")
    assert "careful" in quiet
    assert "hello" in stderr_of(code.format(True), RANK="3", WORLD_SIZE="4")


def test_format_and_level_can_be_set() -> None:
    """A custom format may contain the rank; the level may be a name."""
    code = (
        "log_basic_config('DEBUG', '%(rank)d of %(world_size)d %(asctime)s %(message)s', "
        "datefmt='today'); log.debug('hello')"
    )
    assert stderr_of(code, RANK="0", WORLD_SIZE="2") == "0 of 2 today hello\n"


def test_second_call_has_no_effect_without_force() -> None:
    """The first configuration is kept, as with `logging.basicConfig`."""
    code = """
log_basic_config(format="first %(message)s")
log_basic_config(logging.ERROR, "second %(message)s")
log.info("a")
log_basic_config(logging.ERROR, "third %(message)s", force=True)
log.info("b")
log.error("c")
assert len(logging.getLogger().handlers) == 1
"""
    assert stderr_of(code) == "first a\nthird c\n"


def test_records_go_to_the_current_stderr() -> None:
    """A live display that redirects `sys.stderr` receives the lines meanwhile."""
    code = """
log_basic_config(format="%(message)s")
log.info("before")
sys.stderr, original = io.StringIO(), sys.stderr
log.info("during")
captured, sys.stderr = sys.stderr, original
log.info("after")
assert captured.getvalue() == "during\\n"
"""
    assert stderr_of(code) == "before\nafter\n"


def test_missing_stderr_is_ignored() -> None:
    """Without a console `sys.stderr` is None, and nothing is written."""
    code = "log_basic_config(); original = sys.stderr; sys.stderr = None; log.info('x')"
    assert stderr_of(code + "; sys.stderr = original") == ""


def test_logging_loads_no_torch() -> None:
    """The rank comes from the environment."""
    assert stderr_of("log_basic_config(); assert 'torch' not in sys.modules") == ""


@contextmanager
def bare_root() -> Iterator[logging.Logger]:
    """Reset the root logger as in a new process; restore pytest's handlers afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        yield root
    finally:
        root.handlers = handlers
        root.setLevel(level)


def test_root_logger_has_one_handler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first call installs one handler with the rank's level."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with bare_root() as root:
        log_basic_config(logging.DEBUG)
        log_basic_config(logging.ERROR)
        assert root.level == logging.DEBUG
        assert [handler.level for handler in root.handlers] == [logging.WARNING]
        logging.getLogger("here").warning("hello")
        assert capsys.readouterr().err.startswith("[rank 1/2] ")
        log_basic_config(logging.INFO, "%(message)s", all_ranks=True, force=True)
        assert [handler.level for handler in root.handlers] == [logging.NOTSET]


def test_one_process_logs_all_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher, the handler accepts all records."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with bare_root() as root:
        log_basic_config()
        assert [handler.level for handler in root.handlers] == [logging.NOTSET]


def test_control_characters_are_escaped() -> None:
    """Names from files, and errors about them, are escaped."""
    code = """
log_basic_config()
try:
    raise ValueError("\\x1b[2J")
except ValueError:
    log.exception("found %s\\nand\\tmore", "\\x1b[31mred\\u202e")
"""
    text = stderr_of(code)
    assert "found \\x1b[31mred\\u202e\nand\tmore\n" in text
    assert "ValueError: \\x1b[2J\n" in text
    assert "\x1b" not in text


def test_arguments_forge_no_lines() -> None:
    """Line ends in strings are escaped, and lines of other arguments are indented."""
    code = """
log_basic_config(format="%(levelname)s %(message)s")
forged = "loss\\nINFO all is well\\r\\u2028x"
log.warning("metric %s is %d, %r", forged, 3, forged)
log.warning("failed: %s", ValueError(forged))
log.warning("%(name)s", {"name": forged})
"""
    lines = stderr_of(code).splitlines()
    assert lines[0].startswith(r"WARNING metric loss\nINFO all is well\r\u2028x is 3, 'loss")
    assert lines[1:3] == ["WARNING failed: loss", r"    INFO all is well\r\u2028x"]
    assert not any(line.startswith("INFO") for line in lines)


@pytest.mark.parametrize("wrong", ["%rank %(message)s", "%(message)s %", "50% %(message)s"])
def test_a_format_with_a_stray_percent_sign_is_refused(wrong: str) -> None:
    """Such a format would print the dict of all fields, or fail at every record."""
    with bare_root() as root:
        with pytest.raises(ValueError, match=r"expected fields such as %\(rank\)d, found '%"):
            log_basic_config(format=wrong)
        assert not root.handlers
        log_basic_config(format="%(rank)-4d 100%% %(msecs)03.1f %(message)s")
