"""Tests of the program: help, usage errors, exit codes, signals, imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click
import pytest
from tests.cli.running import LONGEST_S, environment
from torch.utils.data import DataLoader, Dataset

from robo_orchard_core.utils.config.errors import ConfigFieldError
from robo_orchard_lab.cli import main as program
from robo_orchard_lab.cli.errors import CommandError, ExitCode, error_lines, exit_code_of
from robo_orchard_lab.cli.main import COMMANDS, main
from robo_orchard_lab.pipeline.errors import (
    PipelineConfigError,
    RankFailed,
    RankFailure,
    RunPreempted,
)

EVERY_COMMAND = [
    (name, reference) for section in COMMANDS.values() for name, (_, reference) in section.items()
]


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def body(arguments: list[str]) -> int:
        raise error

    return body


def test_help_does_not_import_torch() -> None:
    """The process that prints help has not imported torch."""
    listing = "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from robo_orchard_lab.cli.main import main; "
         f"main(['--help']); {listing}"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )  # fmt: skip
    assert done.stdout.startswith("Usage: robo-orchard-lab [OPTIONS] COMMAND ...")
    for name, _ in EVERY_COMMAND:
        assert re.search(rf"^  {name}  +[A-Z].*\.$", done.stdout, re.MULTILINE), name
    assert not {"torch", "accelerate"} & set(done.stderr.split())


@pytest.mark.parametrize(("name", "reference"), EVERY_COMMAND)
def test_each_command_has_help(
    name: str, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Help of a command shows its usage, its purpose and its options."""
    module, _, attribute = reference.partition(":")
    command = getattr(import_module(module), attribute)
    assert command.name == name
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: robo-orchard-lab {name}")
    assert "--debug" in shown
    assert "-h, --help" in shown
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} says nothing about itself"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["docter"], "error: there is no command 'docter'; did you mean 'doctor'?\n"),
        (["x"], "error: there is no command 'x'; expected "),
        (["--versoin"], "error: no such option"),
        (["completion"], "error: missing argument"),
        (["completion", "csh"], "'csh' is not one of 'bash', 'zsh', 'fish'"),
        (["completion", "bash", "zsh"], "error: got unexpected extra argument (zsh)"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says what is wrong and names the help; standard output stays empty."""
    assert main(arguments) == ExitCode.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    *_, last = shown.err.splitlines()
    assert last.endswith("--help` for usage")


def test_no_command_prints_help_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command, help goes to standard error."""
    assert main([]) == ExitCode.USAGE
    shown = capsys.readouterr()
    assert (shown.out, shown.err.startswith("Usage: robo-orchard-lab")) == ("", True)


def test_version_names_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is the version of the distribution."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("robo-orchard-hooks")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (CommandError("no run here", "start one"), 2, ["error: no run here", "       start one"]),
        (CommandError("gone", exit_code=ExitCode.FAILED), 1, ["error: gone"]),
        (click.BadParameter("Must be more."), 2, ["error: invalid value: Must be more"]),
        (ConfigFieldError("must be >= 1", ("a", "b")), 2, ["error: a.b: must be >= 1"]),
        (PipelineConfigError("max_epoch must be given"), 2, ["error: max_epoch must be given"]),
        (RunPreempted(75), 75, []),
        (RunPreempted(143), 143, []),
        (SystemExit("bye"), 1, ["error: bye"]),
        (SystemExit(None), 0, []),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
        (
            RankFailed(RankFailure(1, "ValueError", "bad")),
            1,
            ["error: rank 1 failed first: ValueError: bad"],
        ),
    ],
)
def test_errors_have_an_exit_code_and_two_lines(
    error: BaseException, code: int, lines: list[str]
) -> None:
    """Each kind of error has an exit code and at most two lines."""
    assert (exit_code_of(error), error_lines(error)) == (code, lines)


def test_many_errors_of_a_file_fit_into_two_lines() -> None:
    """The first error is printed, and the number of further errors."""
    error = ConfigFieldError("first", ("a",))
    error.source = "x.yaml"
    error.others = (ConfigFieldError("second", ("b",)),)
    assert error_lines(error) == ["error: x.yaml: a: first", "       also b: second"]
    error.others *= 3
    assert error_lines(error) == [
        "error: x.yaml: a: first",
        "       and 3 more; `robo-orchard-lab config check` lists all errors",
    ]


def test_an_error_of_user_code_names_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The error has file, line and hook; --debug prints the traceback."""
    error = ValueError("shapes differ:\n  one\n  two")
    error.add_note("raised in hook 'stats' (on_step, before): function f from x.py:1")
    monkeypatch.setattr(program, "_run", raising(error))
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["doctor"]) == ExitCode.FAILED
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: ValueError: shapes differ: ..."
    assert re.fullmatch(
        r" {7}raised at test_main.py:\d+, in hook 'stats' \(on_step, before\): function f from "
        r"x.py:1; --debug shows the traceback",
        second,
    )
    assert main(["doctor", "--debug"]) == ExitCode.FAILED
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_error_in_a_library_names_the_line_of_the_caller() -> None:
    """The error also names the calling line of the user's code if a library raises."""
    try:
        json.loads("{")
    except ValueError as error:
        _, place = error_lines(error)
    assert re.search(r"raised at .*json/decoder.py:\d+, called from .*test_main.py:\d+; ", place)


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        error = KeyError(f"no sample {index}")
        error.add_note("while it was loaded")
        raise error


def test_an_error_of_a_dataloader_worker_names_its_line() -> None:
    """Message and line are read from the text of torch's error."""
    try:
        next(iter(DataLoader(Broken(), num_workers=1)))
    except KeyError as error:
        said, place = error_lines(error)
    assert said == "error: KeyError: 'no sample 0', in a DataLoader worker"
    assert re.search(r"raised at .*test_main.py:\d+; --debug", place)


def test_errors_of_a_job_name_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line of an error has the rank if the process is part of a job."""
    monkeypatch.setattr(program, "_run", raising(CommandError("no", "yes")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    main([])
    assert capsys.readouterr().err == "[rank 1] error: no\n[rank 1]        yes\n"


def test_one_rank_of_a_machine_prints_a_usage_error() -> None:
    """The first rank prints the error; other ranks wait for SIGTERM of the launcher."""
    wrong = """
        from robo_orchard_lab.cli.errors import CommandError
        print("begun", flush=True)
        raise CommandError("no")
    """
    ended = {}
    for rank in ("1", "0"):
        ranks = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        started = subprocess.Popen(
            python(wrong),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(ranks),
        )
        if rank == "1":
            assert started.stdout is not None
            assert started.stdout.readline() == "begun\n"
            time.sleep(0.5)
            started.terminate()
        _, err = started.communicate(timeout=LONGEST_S)
        ended[rank] = (started.returncode, err)
    assert ended == {"1": (ExitCode.TERMINATED, ""), "0": (ExitCode.USAGE, "[rank 0] error: no\n")}


def test_a_usage_error_of_a_single_rank_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rank prints its error if the first rank does not end."""
    monkeypatch.setattr(program, "_run", raising(CommandError("no")))
    monkeypatch.setattr(program, "_FIRST_RANK_REPORTS_S", 0.1)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main([]) == ExitCode.USAGE
    assert capsys.readouterr().err == "[rank 1] error: no\n"


def python(body: str) -> list[str]:
    """Return a program that runs this body instead of a command."""
    return [
        sys.executable,
        "-c",
        "import sys, time\nfrom robo_orchard_lab.cli import main as program\n"
        f"def body(arguments):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "program._run = body\nsys.exit(program.main())\n",
    ]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, ExitCode.TERMINATED, ""),
        (signal.SIGINT, ExitCode.INTERRUPTED, "error: interrupted\n"),
    ],
)
def test_signals_close_open_scopes(number: int, code: int, said: str) -> None:
    """SIGTERM and Ctrl-C run finally blocks, set the exit code and print no traceback."""
    waits = """
        try:
            print("open", flush=True)
            time.sleep(60)
        finally:
            print("closed", flush=True)
    """
    started = subprocess.Popen(
        python(waits), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "open\n"
    started.send_signal(number)
    out, err = started.communicate(timeout=LONGEST_S)
    assert (started.returncode, out, err) == (code, "closed\n", said)


def test_a_second_sigterm_ends_the_process_at_once() -> None:
    """A second SIGTERM interrupts cleanup."""
    waits = """
        try:
            print("open", flush=True)
            time.sleep(60)
        finally:
            print("closing", flush=True)
            time.sleep(60)
    """
    started = subprocess.Popen(python(waits), stdout=subprocess.PIPE, text=True, env=environment())
    assert started.stdout is not None
    for expected in ("open\n", "closing\n"):
        assert started.stdout.readline() == expected
        started.send_signal(signal.SIGTERM)
    started.communicate(timeout=LONGEST_S)
    assert started.returncode == -signal.SIGTERM


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_closed_pipe_is_no_error(lines: int) -> None:
    """The program exits quietly if the reader ended, as after ``| head``."""
    prints = f"""
        time.sleep(0.3)
        for number in range({lines}):
            print("x" * 100)
    """
    with subprocess.Popen(
        python(prints), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()
        assert (started.wait(LONGEST_S), started.stderr.read()) == (0, "")


def test_another_broken_pipe_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken pipe inside a training is printed as an error."""
    monkeypatch.setattr(program, "_run", raising(BrokenPipeError("of a queue")))
    assert main([]) == ExitCode.FAILED
    assert "BrokenPipeError: of a queue" in capsys.readouterr().err


def test_a_thread_can_call_main() -> None:
    """No signal handler is set outside the main thread."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_python_m_does_not_import_from_the_working_directory(tmp_path: Path) -> None:
    """``python -m`` imports no module from files in the working directory."""
    for name in ("click", "yaml", "torch", "pydantic", "typing_extensions"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported a stranger')")
    done = subprocess.run(
        [sys.executable, "-m", "robo_orchard_lab", "completion", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: robo-orchard-lab completion")


def test_child_processes_do_not_import_from_the_working_directory(tmp_path: Path) -> None:
    """A child process, such as a DataLoader worker, imports Python's own modules."""
    folder = tmp_path / "here"
    folder.mkdir()
    for module in ("multiprocessing", "runpy", "torch"):
        (folder / f"{module}.py").write_text("raise SystemExit('taken from the folder')\n")
    script = tmp_path / "robo-orchard-lab"
    script.write_text(
        "import multiprocessing, sys\n"
        "from robo_orchard_lab.cli.main import main\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
        "    process = multiprocessing.get_context('spawn').Process(target=int)\n"
        "    process.start()\n"
        "    process.join()\n"
        "    sys.exit(process.exitcode)\n"
    )
    command = [sys.executable, str(script), "--version"]
    variables = {name: v for name, v in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
