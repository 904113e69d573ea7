"""Runner of pages: files, namespaces, commands, wildcards, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import Output, Page

FENCE = "```"


def page(tmp_path: Path, *blocks: tuple[str, str]) -> Page:
    """Return a page with these blocks, a language and its text each."""
    text = "\n".join(f"{FENCE}{language}\n{body}\n{FENCE}\n" for language, body in blocks)
    (tmp_path / "page.md").write_text(f"# Title\n\n{text}", "utf-8")
    return Page(tmp_path / "page.md", tmp_path / "run")


def run_and_check(ran: Page) -> None:
    ran.run()
    ran.check()


def test_blocks_share_files_names_and_variables(tmp_path: Path) -> None:
    """Python continues in the names of earlier blocks, imports files, and shares the folder with
    commands.
    """
    ran = page(
        tmp_path,
        ("python", "# from_page.py\nVALUE = 3"),
        ("python", "import from_page\nx = from_page.VALUE"),
        ("python", "print(x + 1)\nfrom pathlib import Path\nPath('made.txt').write_text('made')"),
        ("text", "4"),
        ("console", "$ export WHERE=here\n$ cat \\\n    made.txt && echo $WHERE\nmadehere"),
        ("console", "$ python from_page.py\n$ ls\nfrom_page.py  made.txt"),
    )
    run_and_check(ran)


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ([("python", "print(1)")], r"page.md:6[\s\S]*\+1"),
        ([("python", "print(1)"), ("text", "2")], r"page.md:8[\s\S]*-2\n\+1"),
        ([("console", "$ echo 1")], r"page.md:5[\s\S]*\+1"),
        ([("console", "$ false")], "page.md:4: false exits with 1"),
        ([("console", "$ echo error: no\nerror: no")], "exits with 0"),
        ([("bash", "echo 1")], "page.md:3: bash does not run"),
        ([("console", "echo 1")], r"page.md:3: expected a console block to begin with \$"),
    ],
)
def test_a_page_that_shows_something_else_fails(
    blocks: list[tuple[str, str]], problem: str, tmp_path: Path
) -> None:
    """Missing and different output, exit codes and unknown blocks fail with their line."""
    ran = page(tmp_path, *blocks)
    with pytest.raises(AssertionError, match=problem):
        run_and_check(ran)


def test_the_output_is_rewritten(tmp_path: Path) -> None:
    """Output is written where it is missing or different; lines that match stay."""
    ran = page(
        tmp_path,
        ("python", "print('new')"),
        ("console", "$ echo one && echo two\nt...\n$ false\n$ echo $?\n0"),
    )
    ran.run()
    ran.rewrite()
    assert (tmp_path / "page.md").read_text("utf-8") == (
        f"# Title\n\n{FENCE}python\nprint('new')\n{FENCE}\n\n{FENCE}text\nnew\n{FENCE}\n\n"
        f"{FENCE}console\n$ echo one && echo two\none\nt...\n$ false\n$ echo $?\n1\n{FENCE}\n"
    )


@pytest.mark.parametrize(
    ("expected", "found", "is_equal"),
    [
        ("loss 0.65...", "loss 0.6512 in a", True),
        ("loss  0.65  s", "loss 0.651     s", True),
        ("loss 0.65", "loss 0.70", False),
        ("step 100", "step 101", False),
        ("at 0:00:10", "at 1:20:11", True),
        ("curve ▁▂█", "curve ▁█", True),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a\n...\nd", "a\nd", True),
        ("a\n...\nd", "a\nb", False),
        ("a ...", "a\nb", False),
        ("version 1.2.3", "version 1.2.4", False),
        ("", "more", False),
    ],
)
def test_output_is_compared_by_lines(expected: str, found: str, is_equal: bool) -> None:
    """Wildcards cover a line or lines, decimals have a tolerance, integers none."""
    output = Output(0, 0, expected.splitlines(), found.splitlines())
    assert output.is_expected == is_equal
