"""Live pages of ``view`` in headless Chromium: a run in progress, and hostile names."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_view import NAME, serving
from tests.report.test_browser import browser as browser

from run_folders import HOSTILE, record, write_metrics
from run_in_progress import run_in_progress

pytestmark = pytest.mark.browser
LONGEST_S = 60.0
POINTS = "return report.data.runs[0].series['loss/total'].points"
DRAWN = "return report.charts[0].plot.data[0].length"
ZOOM = (
    "return report.charts.filter(c => c.plot).map(c => [c.plot.scales.x.min, c.plot.scales.x.max])"
)


def wait_until(page: Any, script: str, *arguments: Any) -> None:
    """Wait until a script returns true."""
    ends_at = time.monotonic() + LONGEST_S
    while not page.execute_script(script, *arguments):
        assert time.monotonic() < ends_at, page.find_element("tag name", "body").text[:2000]
        time.sleep(0.1)


def requested(page: Any) -> set[str]:
    """Return the servers to which the page made requests."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    addresses = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return {address.split("/")[2] for address in addresses if not address.startswith("data:")}


def test_an_open_report_follows_its_run(browser: Any, tmp_path: Path) -> None:
    """Curves grow, and zoom, hidden curves, open sections and focus stay; then the death shows."""
    runs = tmp_path / "runs"
    with run_in_progress(runs / "spirals") as process, serving(runs) as server:
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(server.address)
        wait_until(browser, "return document.querySelectorAll('td a').length === 1")
        browser.find_element("css selector", "td a").click()
        wait_until(browser, "return window.report?.charts[0]?.plot !== null")
        browser.execute_script(
            "document.querySelector('#timeline details').open = true;"
            "document.querySelector('.legend button').click();"
            "report.setZoom({min: 3, max: 9});"
            "document.querySelector('#timeline summary').focus();"
            "window.first = document.querySelector('#curves')"
        )
        before, drawn = browser.execute_script(POINTS), browser.execute_script(DRAWN)
        wait_until(browser, f"{POINTS} >= arguments[0]", before + 20)
        assert browser.execute_script(DRAWN) >= drawn + 20
        assert {tuple(each) for each in browser.execute_script(ZOOM)} == {(3, 9)}
        assert browser.execute_script(
            "return [report.charts[0].shown[0], document.querySelector('#timeline details').open,"
            "document.activeElement === document.querySelector('#timeline summary'),"
            "document.querySelector('#curves') === window.first,"
            "document.querySelector('.live').innerText.includes('live')]"
        ) == [False, True, True, True, True]
        browser.execute_script("report.setZoom(null)")
        steps = browser.execute_script(POINTS)
        wait_until(browser, f"{POINTS} > arguments[0]", steps + 5)
        [[low, high], *_] = browser.execute_script(ZOOM)
        assert low == 1
        assert high >= steps + 5
        browser.save_screenshot(str(tmp_path / "live.png"))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(
            browser, "return document.querySelector('#verdict').innerText.includes('Killed')"
        )
        assert browser.get_log("browser") == []
        assert browser.execute_script("return window.problems ?? []") == []
        assert requested(browser) == {server.address.split("/")[2]}
        server.process.kill()
        wait_until(
            browser, "return document.querySelector('.live').innerText.includes('viewer has ended')"
        )
        browser.get("about:blank")
        browser.get_log("browser")


def test_a_list_with_hostile_names_stays_text(browser: Any, tmp_path: Path) -> None:
    """Names of runs and metrics make no element; the link of a hostile name opens its report."""
    lines = [record(1, **{f"eval/{HOSTILE}/loss": 1.0})]
    run = write_metrics(tmp_path / NAME, lines)
    state = {"state": "running", "process": {"host": HOSTILE}, "started_at": HOSTILE}
    (run / "run_state.json").write_text(json.dumps(state))
    with serving(tmp_path) as server:
        browser.get_log("browser")
        browser.get(server.address)
        wait_until(browser, "return document.querySelectorAll('td a').length === 1")
        counts = "return document.querySelectorAll('#page script, #page img, [onerror]').length"
        assert browser.execute_script(counts) == 0
        metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scroll = browser.execute_script("return document.documentElement.scrollWidth")
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert scroll <= 400
        assert NAME[:30] in browser.find_element("css selector", "td a").text
        browser.find_element("css selector", "td a").click()
        wait_until(browser, "return window.report?.charts.length === 1")
        wait_until(browser, "return document.querySelector('.live').innerText.includes('live')")
        assert browser.execute_script(counts) == 0
        assert browser.get_log("browser") == []
        browser.find_element("css selector", ".live a").click()
        wait_until(browser, "return document.querySelectorAll('td a').length === 1")
        browser.get("about:blank")
