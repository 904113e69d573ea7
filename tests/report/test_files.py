"""Incremental reading of files with a JSON object per line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from robo_orchard_lab.report import files
from robo_orchard_lab.report.files import LineReader, Problems


def values(reader: LineReader, problems: Problems | None = None) -> list[int]:
    return [found["a"] for found in reader.read(Problems() if problems is None else problems)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 7)
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 40)


def test_only_new_lines_are_read(tmp_path: Path) -> None:
    """Each read returns the lines that were added; a cut line waits for its end."""
    path = tmp_path / "x.jsonl"
    reader = LineReader(path, follow=True)
    assert values(reader) == []
    with path.open("w") as file:
        for text, expected in [
            ('{"a": 1}\n{"a": 2}\n', [1, 2]),
            ("", []),
            ('{"a": 3', []),
            ('}\n{"a": 4}\n{', [3, 4]),
            ('"a": 5}\n', [5]),
        ]:
            file.write(text)
            file.flush()
            assert values(reader) == expected


def test_a_read_costs_its_new_lines_alone(tmp_path: Path) -> None:
    """After 30 MB, a new line costs the bytes of that line."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' * 3_000_000)
    reader = LineReader(path, b"none", follow=True)
    assert values(reader) == []
    with path.open("a") as file:
        file.write('{"a": 2, "b": "none"}\n')
    before = Path("/proc/self/io").read_text().split()[1]
    assert values(reader) == [2]
    assert int(Path("/proc/self/io").read_text().split()[1]) - int(before) < 10_000


def test_a_replaced_and_a_shorter_file_are_read_from_the_start(tmp_path: Path) -> None:
    """Another file of the name, a truncated one and a file that is back begin again."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    reader = LineReader(path, follow=True)
    assert (values(reader), reader.restarted) == ([1, 2], True)
    assert (values(reader), reader.restarted) == ([], False)
    path.write_text('{"a": 3}\n')
    assert (values(reader), reader.restarted) == ([3], True)
    (tmp_path / "y").write_text('{"a": 4}\n{"a": 5}\n')
    os.replace(tmp_path / "y", path)
    assert (values(reader), reader.restarted) == ([4, 5], True)
    path.unlink()
    assert (values(reader), reader.restarted) == ([], True)
    path.write_text('{"a": 6}\n')
    assert (values(reader), reader.restarted) == ([6], True)


def test_a_file_that_was_cut_and_has_grown_again_is_read_from_the_start(tmp_path: Path) -> None:
    """A resumed run cuts its metrics file; other lines in place of the read ones are seen."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    reader = LineReader(path, follow=True)
    assert values(reader) == [1, 2]
    path.write_text('{"a": 1}\n{"a": 3000}\n{"a": 4}\n')
    assert (values(reader), reader.restarted) == ([1, 3000, 4], True)
    with path.open("a") as file:
        file.write('{"a": 5}\n')
    assert (values(reader), reader.restarted) == ([5], False)


@pytest.mark.usefixtures("small_blocks")
def test_lines_are_complete_at_any_block_size(tmp_path: Path) -> None:
    """Lines longer than a block are complete; too long and damaged lines are counted once."""
    path, problems = tmp_path / "x.jsonl", Problems()
    long = '{"a": 2, "b": "' + "x" * 500 + '"}\n'
    path.write_text('{"a": 1}\n' + long + '{"a": 3}\nbroken\n\n{"a": 4}')
    assert values(LineReader(path), problems) == [1, 3, 4]
    assert problems == ["3 lines of x.jsonl can't be read and are left out"]


@pytest.mark.usefixtures("small_blocks")
def test_lines_without_the_mark_are_not_parsed(tmp_path: Path) -> None:
    """Only lines with the mark are read, wherever the blocks end."""
    path, problems = tmp_path / "x.jsonl", Problems()
    path.write_text('broken\n{"a": 1}\n{"a": 2, "eval/": 0}\nbroken\n{"eval/": 0, "a": 3}\n{"ev')
    assert values(LineReader(path, b'"eval/'), problems) == [2, 3]
    assert problems == []
