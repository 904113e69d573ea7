"""Tests of the command ``view``: a server in another process, and real sockets."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from tests.cli.running import START, environment

from robo_orchard_lab.cli.main import main
from robo_orchard_lab.report.story import read_story
from run_folders import HOSTILE, Page, record, write_metrics
from run_in_progress import run_in_progress, wait_for_steps

LONGEST_S = 60.0
NAME = HOSTILE.replace("/", "|")
"""A hostile name that a folder can have."""


@dataclass(frozen=True)
class Server:
    """A server in another process."""

    address: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        found = urlsplit(self.address).port
        assert found is not None
        return found

    @property
    def token(self) -> str:
        return urlsplit(self.address).path.strip("/")

    def get(self, path: str = "", **headers: str) -> httpx.Response:
        return httpx.get(self.address + path, headers=headers, timeout=LONGEST_S)

    def ask(self, request: str) -> str:
        """Send text over a socket; return the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=LONGEST_S) as connection:
            connection.sendall(request.encode("latin-1"))
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return answer.decode()

    def status(self, target: str, host: str | None = "127.0.0.1", method: str = "GET") -> int:
        """Return the status of a request whose target is sent as it is."""
        named = "" if host is None else f"Host: {host}\r\n"
        version = "1.0" if host is None else "1.1"
        request = f"{method} {target} HTTP/{version}\r\n{named}Connection: close\r\n\r\n"
        return int(self.ask(request).split(" ", 2)[1])


@contextmanager
def serving(folder: Path, *options: str, **variables: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [*START, "view", str(folder), *options],
        env=environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert process.stdout.readline() == "Ctrl-C ends the server.\n"
        yield Server(address, process)
    finally:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs, next to a run outside, to which links lead."""
    top = tmp_path_factory.mktemp("view")
    write_metrics(top / "outside" / "secret", [record(1, secret=1.0)])
    runs = top / "runs"
    write_metrics(runs / "a", [record(s, **{"eval/x/loss": 1 / s}) for s in range(1, 9)])
    write_metrics(runs / "deep" / NAME, [record(1, **{HOSTILE: 1.0})])
    (runs / "deep" / NAME / "run_state.json").write_text(json.dumps({"error": {"type": HOSTILE}}))
    (runs / "link").symlink_to(top / "outside")
    (runs / "linked").symlink_to(top / "outside" / "secret")
    write_metrics(runs / "b", [])
    (runs / "b" / "metrics.jsonl").unlink()
    (runs / "b" / "metrics.jsonl").symlink_to(top / "outside" / "secret" / "metrics.jsonl")
    (runs / "b" / "run_state.json").write_text("{}")
    (runs / "b" / "text.txt").write_text("a file of a run")
    return runs


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as found:
        yield found


def test_the_address_is_of_this_machine_with_a_long_random_token(
    server: Server, folder: Path
) -> None:
    """The server listens on 127.0.0.1 alone; each start has another token of 256 bits."""
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{43}/", server.address)
    process = psutil.Process(server.process.pid)
    listening = [each for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
    assert [tuple(each.laddr) for each in listening] == [("127.0.0.1", server.port)]
    with serving(folder) as other:
        assert other.token != server.token


def test_nothing_is_served_without_the_token(server: Server) -> None:
    """A missing, wrong, shortened or prolonged token is answered with 404, for any path."""
    token = server.token
    for wrong in ("", token[:-1], token + "x", token.swapcase(), "%ff", "..", f"x/{token}", "é"):
        for path in ("", "/", "/runs", "/run/a", "/data/a"):
            assert server.status(f"/{wrong}{path}".replace("é", "\xe9")) in (400, 404)
    assert server.status("/") == 404
    assert server.status(f"/?token={token}") == 404
    assert server.status(f"/{token}/") == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:1234", 200),  # through a forwarded port
        ("localhost", 200),
        ("localhost:80", 200),
        ("evil.example", 400),
        ("evil.example:{port}", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example:{port}", 400),
        ("localhost@evil.example", 400),
        ("0.0.0.0", 400),
        ("", 400),
        (None, 400),
    ],
)
def test_another_host_name_is_refused(server: Server, host: str | None, status: int) -> None:
    """A page of a name that was rebound to 127.0.0.1 gets no answer, even with the token."""
    named = None if host is None else host.replace("{port}", str(server.port))
    assert server.status(f"/{server.token}/", named) == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"])
def test_the_server_is_read_only(server: Server, method: str) -> None:
    """Other methods than GET and HEAD are refused."""
    for path in ("", "run/a", "data/a", "runs"):
        assert server.status(f"/{server.token}/{path}", method=method) in (400, 404, 405)
    assert server.status(f"/{server.token}/run/a", method="HEAD") == 200


@pytest.mark.parametrize(
    "path",
    [
        "../outside/secret",
        "%2e%2e/outside/secret",
        "..%2foutside%2fsecret",
        "a/../../outside/secret",
        "a/..",
        "link/secret",
        "linked",
        "{outside}",
        "%2f{outside}",
        "deep",
        "b/text.txt",
        "b/checkpoints",
        "a/metrics.jsonl",
        "none",
        "a%00",
        "x" * 5000,
        "%ff%fe",
        "..\\\\outside",
    ],
)
def test_no_path_leads_out_of_the_folder(server: Server, folder: Path, path: str) -> None:
    """Dots, links, absolute paths and files are answered with 404, as page and as data."""
    path = path.replace("{outside}", str(folder.parent / "outside" / "secret"))
    for kind in ("run", "data"):
        assert server.status(f"/{server.token}/{kind}/{path}") == 404


def test_files_behind_links_are_not_read(server: Server) -> None:
    """A metrics file that is a link shows no value."""
    [found] = server.get("data/b").json()["runs"]
    assert found["series"] == {}
    assert any("metrics.jsonl can't be read" in problem for problem in found["problems"])


def test_the_list_has_the_runs_of_the_folder(server: Server) -> None:
    """The data of the list has each run, no run behind a link, and addresses that open."""
    answer = server.get("runs")
    found = {each["name"]: each for each in answer.json()["runs"]}
    assert list(found) == ["a", "b", f"deep/{NAME}"]
    assert (found["a"]["metric"], found["a"]["best"], found["a"]["best_step"]) == (
        *("eval/x/loss", 0.125, 8),
    )
    for each in found.values():
        assert server.get(f"run/{each['link']}").status_code == 200
    assert server.get("runs", **{"If-None-Match": answer.headers["etag"]}).status_code == 304


def test_a_page_is_the_report_and_runs_its_own_scripts_alone(server: Server, folder: Path) -> None:
    """The page has the data of `report`; header and page admit its scripts by digest only."""
    answer = server.get("run/" + quote(f"deep/{NAME}"))
    page = Page(answer.text)
    assert page.data["runs"] == [read_story(folder / "deep" / NAME)]
    scripts = page.text_of("script")[1:]
    assert len(scripts) == 3
    header = answer.headers["content-security-policy"]
    [inner] = [
        attributes["content"]
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv")
    ]
    for policy in (header, inner or ""):
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        for script in scripts:
            assert b64encode(sha256(script.encode()).digest()).decode() in policy
    assert header.endswith("frame-ancestors 'none'")
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers
    other = httpx.get(f"http://127.0.0.1:{server.port}/")
    assert other.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_serving_changes_no_file(server: Server, folder: Path) -> None:
    """After all pages were served, the folder has the same files of the same times."""

    def files() -> list[tuple[str, int]]:
        return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))

    before = files()
    for path in ("", "runs", "run/a", "data/a", "run/b"):
        assert server.get(path).status_code == 200
    assert files() == before


def test_the_data_of_a_run_in_progress_grows_until_its_death(tmp_path: Path) -> None:
    """New records make new data with a new tag, else the answer is 304; then kill -9 shows."""
    with run_in_progress(tmp_path / "now") as process, serving(tmp_path) as server:
        first = server.get("data/now")
        wait_for_steps(tmp_path / "now", 40, process)
        ends_at = time.monotonic() + LONGEST_S
        while second := server.get("data/now", **{"If-None-Match": first.headers["etag"]}):
            if second.status_code == 200 and _points(second) >= 40:
                break
            assert second.status_code in (200, 304)
            assert time.monotonic() < ends_at
            time.sleep(0.1)
        assert _points(second) > _points(first)
        assert server.get("runs").json()["runs"][0]["state"] == "running"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while server.get("data/now").json()["runs"][0]["verdict"]["state"] == "running":
            assert time.monotonic() < ends_at
            time.sleep(0.1)
        shutil.rmtree(tmp_path / "now")
        assert server.get("data/now").status_code == 404


def _points(answer: httpx.Response) -> int:
    return int(answer.json()["runs"][0]["series"]["loss/total"]["points"])


def test_the_server_answers_while_a_report_is_made(tmp_path: Path) -> None:
    """While a large run is read, other pages are served; a killed reader is replaced."""
    write_metrics(tmp_path / "large", [record(s, a=1.0, b=2.0) for s in range(60_000)])
    write_metrics(tmp_path / "small", [record(1, a=1.0)])
    with serving(tmp_path) as server:
        assert server.get("data/small").status_code == 200
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.get("data/large")))
        thread.start()
        served = 0
        while not answers and served < 50:
            assert server.get("").status_code == 200
            assert server.get("data/small").status_code == 200
            served += 1
        assert served >= 10
        thread.join()
        assert answers[0].json()["runs"][0]["series"]["a"]["points"] == 60_000
        for child in psutil.Process(server.process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
        with (tmp_path / "small" / "metrics.jsonl").open("a") as file:
            file.write(record(2, a=2.0))
        ends_at = time.monotonic() + LONGEST_S
        while server.get("data/small").json()["runs"][0]["series"]["a"]["points"] == 1:
            assert time.monotonic() < ends_at
            time.sleep(0.1)


def test_ctrl_c_ends_the_server_and_its_processes(folder: Path) -> None:
    """Ctrl-C, to all processes of the terminal, ends them within seconds, without a traceback."""
    with serving(folder, PYTHONPROFILEIMPORTTIME="1") as server:
        assert server.get("data/a").status_code == 200
        process = psutil.Process(server.process.pid)
        others = process.children(recursive=True)
        assert others
        for each in (*others, process):
            each.send_signal(signal.SIGINT)
        out, err = server.process.communicate(timeout=LONGEST_S)
        assert server.process.returncode == 130
        _, alive = psutil.wait_procs(others, timeout=LONGEST_S)
    assert alive == []
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert lines == []
    assert "| torch" not in err
    assert server.token not in err


def test_a_killed_server_leaves_no_process(folder: Path) -> None:
    """After kill -9 of the server, the processes that read runs end as well."""
    with serving(folder) as server:
        assert server.get("data/a").status_code == 200
        others = psutil.Process(server.process.pid).children(recursive=True)
        assert others
        server.process.kill()
        _, alive = psutil.wait_procs(others, timeout=LONGEST_S)
    assert alive == []


def test_view_refuses_what_it_cannot_serve(
    server: Server,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A missing folder, a used port and missing packages are errors with a remedy."""
    assert main(["view", str(folder / "none")]) == 2
    assert "error: there is no folder" in capsys.readouterr().err
    assert main(["view", str(folder), "--port", str(server.port)]) == 1
    expected = f"error: port {server.port} can't be used: Address already in use"
    assert capsys.readouterr().err.splitlines()[0] == expected
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["view", str(folder)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: view needs starlette and uvicorn",
        '       pip install "robo-orchard-hooks[viewer]"',
    ]


def test_view_shows_one_run(folder: Path) -> None:
    """The folder of a run is a list of one run, at the path ``run/``."""
    with serving(folder / "a") as server:
        [found] = server.get("runs").json()["runs"]
        assert (found["name"], found["link"]) == ("a", "")
        assert server.get("run/").status_code == 200
