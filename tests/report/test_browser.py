"""Reports in headless Chromium: console, requests, curves, dark mode, keyboard, width, axe-core.

They skip themselves without Chromium and ChromeDriver, and the tests of accessibility without
axe-core; ``bash scripts/test_browser.sh`` installs all of them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launching import launch
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.report.page import render
from run_folders import HOSTILE, record, train, write_metrics

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="Selenium is missing: pip install selenium"
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits" / "train.py"
LONGEST_S = 60
AXE = Path(sys.prefix, "browser", "node_modules", "axe-core", "axe.min.js")  # in .venv
AXE = Path(os.environ.get("AXE_CORE", AXE))
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container may have 64 MiB
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)
ON_ERROR = "addEventListener('error', e => (window.scriptErrors ??= []).push(e.message))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a running headless Chromium."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium or ChromeDriver is missing: bash scripts/test_browser.sh")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tempfile.mkdtemp()
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": ON_ERROR})
    try:
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with hostile names, gaps, and one very long curve."""
    rng = random.Random(0)
    lines = [
        record(s, **{"loss/total": 1 / s, HOSTILE: rng.random(), "eval/a/loss": -1.0 * s})
        for s in range(1, 40)
    ]
    lines += [record(40, **{"loss/total": "NaN"}), record(41, **{"loss/total": 0.5})]
    lines += [record(s, lost="NaN") for s in (40, 41)]
    lines += [record(s, long=rng.gauss(0, 1)) for s in range(42, 20_042)]
    folder = write_metrics(tmp_path_factory.mktemp("hostile") / "run", lines)
    hook = {"hook": "<script>alert(1)</script>", "class_name": HOSTILE, "when": "1 step"}
    effects = {"reads": [HOSTILE, "x" * 300], "changes": [], "before": f"{HOSTILE}/a.py:1"}
    channels = ("on_step", "on_epoch", HOSTILE, "")
    plan = [{"channel": channel, **hook, **effects} for channel in channels]
    changes = [{"what": HOSTILE, "before": "y" * 400, "after": HOSTILE}]
    resumes = [{"step": 3, "changes": changes}]
    (folder / "plan.json").write_text(json.dumps({"hooks": plan, "resumes": resumes}))
    times = {"calls": 3, "first_s": 1e-3, "self_s": 0.5, "share": 0.5, "phase": "before"}
    costs = [{**each, **times} for each in plan]
    stages = {HOSTILE: {"step_s": 1.0, "share": 3.0}, "z" * 80: {"step_s": 1e-7, "share": 0}}
    profile = {"steps": 2, "step_seconds": 0.5, "hooks": costs, "stages": stages}
    (folder / "profile.json").write_text(json.dumps(profile))
    events = [{"event": kind, "step": 3, "text": HOSTILE} for kind in ("warning", HOSTILE)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    error = {"type": "RuntimeError", "message": HOSTILE * 20, "hook": HOSTILE, "rank": 3}
    state = {"state": "failed", "error": error, "progress": {"global_step_id": 20_041}}
    (folder / "run_state.json").write_text(json.dumps(state))
    config = {"name": HOSTILE, "hooks": {"x" * 150: {"class_type": "y" * 900}}}
    (folder / "config.yaml").write_text(json.dumps(config))
    media = folder / "media"
    media.mkdir()
    (media / "a.csv").write_text("a,b\n" + "<b>,2\n" * 30)
    (media / "index.jsonl").write_text(
        json.dumps({"name": HOSTILE, "kind": "table", "file": "a.csv", "step": 1})
        + "\n"
        + json.dumps({"name": "gone", "kind": "image", "file": "gone.png"})
    )
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of the digits example, with few random images."""
    folder = tmp_path_factory.mktemp("digits")
    few = ("--dataset.dummy_train_imgs", "32", "--dataset.dummy_val_imgs", "8", "--batch_size", "4")
    options = ("--dataset.pipeline_test", "true", *few, "--max_epoch", "2")
    launch(EXAMPLE, *options, processes=1, folder=folder, timeout_s=600)
    return folder / "workspace" / "digits"


@pytest.fixture(params=["run", "digits", "hostile", "empty", "comparison"])
def page(
    request: pytest.FixtureRequest,
    browser: Any,
    recorded: Path,
    digits: Path,
    hostile: Path,
    tmp_path: Path,
) -> Any:
    """Return the browser with a page of a run, the example, hostile or no files, or several."""
    folders = {
        "run": [recorded],
        "digits": [digits],
        "hostile": [hostile],
        "empty": [tmp_path],
        "comparison": [recorded, hostile],
    }
    return opened(browser, tmp_path, folders[request.param])


def opened(browser: Any, folder: Path, runs: list[Path]) -> Any:
    """Open the page of runs, with all its curves drawn."""
    file = folder / "page.html"
    file.write_text(render(runs), encoding="utf-8")
    browser.set_window_size(1280, 1000)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(file.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => (d.open = true))")
    browser.execute_script("report.drawAll()")
    return browser


def test_a_page_has_no_error_and_makes_no_request(page: Any) -> None:
    """The console is empty, no script fails, and the browser requests the page alone."""
    assert page.get_log("browser") == []
    assert page.execute_script("return window.scriptErrors ?? []") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requested = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requested if not url.startswith("data:")] == [page.current_url]


def test_hostile_names_make_no_element(page: Any) -> None:
    """No element comes from the text of a run, and no script of a run was executed."""
    counts = "return ['#page script', '#page b', '#page [onerror]', 'iframe'].map(s => " + (
        "document.querySelectorAll(s).length)"
    )
    assert page.execute_script(counts) == [0, 0, 0, 0]


def test_each_curve_has_its_points(page: Any) -> None:
    """The points that a chart draws of a curve are the finite points of the page's data."""
    drawn = page.execute_script(
        "return report.charts.map(c => c.series.map((s, i) => "
        "[s.name, c.plot.data[i + 1].filter(y => y != null).length, "
        "s.y.filter(y => y !== null).length]))"
    )
    curves = [curve for chart in drawn for curve in chart]
    assert len(curves) == page.execute_script(
        "return report.data.runs.flatMap(r => Object.keys(r.series)).length"
    )
    for name, points, expected in curves:
        assert points == expected, name
    lost = [name for name, points, _ in curves if not points]
    assert lost in ([], ["lost"], ["hostile0/run"])  # of a comparison, the name of the run


def test_smoothing_and_log_scale_keep_points(page: Any) -> None:
    """Smoothing adds a line to each curve; a log scale drops the values that have no logarithm."""
    page.execute_script("report.state.smoothing = 0.9; report.charts.forEach(c => c.draw())")
    counts = page.execute_script(
        "return report.charts.every(c => c.plot.data.length === 1 + 2 * c.series.length)"
    )
    assert counts is True
    page.execute_script(
        "report.state.smoothing = 0; report.state.log = true; report.charts.forEach(c => c.draw())"
    )
    assert page.execute_script(
        "return report.charts.every(c => c.plot.data.slice(1).flat()"
        ".every(y => !(y <= 0) || y == null))"
    )
    assert page.get_log("browser") == []


def test_dark_mode_follows_the_system_and_the_button(page: Any) -> None:
    """The page's background is dark with a dark system, and the button overrides the system."""
    back = "return getComputedStyle(document.body).backgroundColor"
    shades = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        red = page.execute_script(back).split("(")[1].split(",")[0]
        shades.append(int(red))
    button = page.find_element("css selector", "header .tool")
    button.click()  # light
    shades.append(int(page.execute_script(back).split("(")[1].split(",")[0]))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    light, dark, chosen = shades
    assert light > 200 > 60 > dark
    assert (chosen, button.text) == (light, "Theme: light")


def test_charts_work_with_the_mouse(browser: Any, recorded: Path, tmp_path: Path) -> None:
    """Hover shows the values of a step in all charts; a drag zooms them, a double-click resets."""
    page = opened(browser, tmp_path, [recorded])
    chains = pytest.importorskip("selenium.webdriver.common.action_chains").ActionChains
    plot = page.find_element("css selector", ".plot .u-over")
    width = plot.size["width"]
    step = "return report.charts.map(c => c.step.textContent)"
    chains(page).move_to_element_with_offset(plot, width // 2 - 2, 0).perform()
    assert set(page.execute_script(step)) == {"step 14"}
    shown = page.execute_script("return report.charts[0].cells.map(c => c.textContent)")
    data = page.execute_script("return report.charts[0].series.map(s => s.y.at(-1))")
    assert [float(text) for text in shown] == pytest.approx(data, abs=1e-4)
    spans = "return report.charts.map(c => c.plot.scales.x.max - c.plot.scales.x.min)"
    complete = page.execute_script(spans)
    drag = chains(page).move_to_element_with_offset(plot, -width // 4, 0).click_and_hold()
    drag.move_by_offset(width // 4, 0).release().perform()
    zoomed = page.execute_script(spans)
    assert all(0.2 < now / before < 0.3 for now, before in zip(zoomed, complete, strict=True))
    chains(page).double_click(plot).perform()
    assert page.execute_script(spans) == complete


def test_hooks_have_effects_and_costs(browser: Any, recorded: Path, tmp_path: Path) -> None:
    """The tree shows what a hook reads, changes and requests, once, and its time in a step."""
    folder = Path(shutil.copytree(recorded, tmp_path / "run", symlinks=True))
    times = {"calls": 14, "first_s": 1e-3, "self_s": 2.6e-3, "total_s": 2.6e-3, "share": 0.1}
    cost = {"channel": "on_step", "position": 2, "hook": "losses", "phase": "after", **times}
    stages = {"forward": {"step_s": 1e-3, "share": 0.5}}
    profile = {"steps": 13, "step_seconds": 2e-3, "stages": stages, "hooks": [cost]}
    (folder / "profile.json").write_text(json.dumps(profile))
    opened(browser, tmp_path, [folder])
    section = browser.find_element("id", "hooks")
    items = [" ".join(li.text.split()) for li in section.find_elements("css selector", "li")]
    mine = [text for text in items if text.startswith("losses ")]
    assert [text for text in mine if "reads loss, losses, loss_weight changes metrics" in text] == [
        mine[0]
    ]
    [measured] = [text for text in items if "a step" in text]
    assert measured.startswith("losses LossTracker after robo_orchard_lab/.../loss_tracker.py:")
    assert measured.endswith("200.0 µs a step, 10.0 %")
    summaries = [each.text for each in section.find_elements("css selector", "summary")]
    assert [" ".join(text.split()) for text in summaries][:3] == [
        f"{channel} 200.0 µs a step, 10.0 %" for channel in ("on_loop", "on_epoch", "on_step")
    ]
    table = section.find_element("css selector", "table").text
    assert "forward 1.00 ms 50.0 %" in table


def test_costs_are_in_collapsed_groups(browser: Any, tmp_path: Path) -> None:
    """Curves of ``perf/`` are in two closed groups; those of hooks share a chart, as of stages."""
    names = ["loss", *(f"perf/{name}" for name in ("data_s", "hooks_s"))]
    names += [f"perf/{kind}/{name}" for kind in ("hooks", "stages") for name in "ab"]
    lines = [record(step, **dict.fromkeys(names, 1.0 * step)) for step in (1, 2)]
    file = tmp_path / "page.html"
    file.write_text(render([write_metrics(tmp_path / "run", lines)]))
    browser.get(file.as_uri())
    groups = browser.execute_script(
        "return [...document.querySelectorAll('#curves details')].map(d => [d.open, "
        "d.querySelector('summary').textContent, d.querySelectorAll('.chart').length])"
    )
    assert groups == [[False, "Performance (4 curves)", 3], [False, "Time of hooks (2 curves)", 1]]
    assert len(browser.find_elements("css selector", "#curves > .charts .chart")) == 1


def test_an_interval_is_in_the_chart_of_its_value(browser: Any, tmp_path: Path) -> None:
    """The bounds of an evaluation's value, as of a success rate, share its chart."""
    values = {f"eval/pc_success{end}": 50.0 for end in ("", "_low", "_high")}
    file = tmp_path / "page.html"
    file.write_text(render([write_metrics(tmp_path / "run", [record(1, lr_low=1.0, **values)])]))
    browser.get(file.as_uri())
    charts = browser.execute_script("return report.charts.map(c => [c.title, c.series.length])")
    assert sorted(charts) == [["lr_low", 1], ["pc_success", 3]]


def test_videos_play_and_damaged_media_are_named(browser: Any, tmp_path: Path) -> None:
    """Videos of a step are all shown, and play; damaged and cut files have a text instead."""
    pytest.importorskip("av", reason="PyAV, which encodes videos, is missing")
    frames = np.random.default_rng(0).integers(0, 255, (20, 40, 64, 3), np.uint8)
    hooks = PipelineHooks("rollouts")

    @hooks.on_step.after(when="at steps 7")
    def add(args: PipelineHookArgs) -> None:
        for seed in range(2):
            args.report.add_video("rollout", frames, f"seed {seed}", fps=20)
        for name in ("cut", "half", "text"):
            args.report.add_image(name, frames[0])
        args.report.add_video("broken", frames)

    run = tmp_path / "run"
    train(run, {"rollouts": hooks})
    for name, size in (("cut", 40), ("half", 3000)):
        file = run / "media" / name / "00000007.png"
        file.write_bytes(file.read_bytes()[:size])
    (run / "media" / "text" / "00000007.png").write_text("<svg onload=alert(1)>")
    file = run / "media" / "broken" / "00000007.mp4"
    file.write_bytes(file.read_bytes()[:500])
    page = opened(browser, tmp_path, [run])
    page.set_script_timeout(LONGEST_S)
    played = page.execute_async_script(
        "const video = document.querySelector('video[aria-label^=rollout]');"
        "video.addEventListener('timeupdate', () => video.currentTime > 0.2 && "
        "arguments[0]([video.readyState, video.videoWidth, video.duration]));"
        "video.addEventListener('error', () => arguments[0](video.error.message));"
        "video.play().catch(e => arguments[0](e.message))"
    )
    assert played[0] >= 2
    assert played[1:] == [64, pytest.approx(1.0, abs=0.05)]
    figures = page.find_elements("css selector", "#media figure")
    texts = {figure.text.split("\n")[-1].split(",")[0]: figure.text for figure in figures}
    captions = [each.text for each in figures if each.text.endswith(("seed 0", "seed 1"))]
    assert captions == ["rollout, step 7: seed 0", "rollout, step 7: seed 1"]
    assert texts["cut"].startswith("cut/00000007.png can't be shown: damaged")
    assert texts["broken"].startswith("broken/00000007.mp4 can't be shown: damaged")
    assert texts["half"].startswith("the file is cut")
    assert texts["text"].startswith("text/00000007.png is no image")
    assert len(page.find_elements("css selector", "#media img, #media video")) == 3


def test_charts_work_with_the_keyboard(browser: Any, recorded: Path, tmp_path: Path) -> None:
    """Tab reaches a chart; arrows move its cursor, plus zooms all charts, 0 shows all again."""
    page = opened(browser, tmp_path, [recorded])
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    chains = pytest.importorskip("selenium.webdriver.common.action_chains").ActionChains

    def press(*pressed: str) -> None:
        chains(page).send_keys(*pressed).perform()

    page.execute_script("document.querySelector('#curves .tool').focus()")
    for _ in range(20):
        press(keys.TAB)
        if page.execute_script("return document.activeElement.className") == "plot":
            break
    step = "return document.activeElement.closest('figure').querySelector('.soft').textContent"
    press(keys.HOME)
    assert page.execute_script(step) == "step 1"
    press(keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    assert page.execute_script(step) == "step 3"
    width = "return report.charts.map(c => c.plot.scales.x.max - c.plot.scales.x.min)"
    complete = page.execute_script(width)
    press("+")
    zoomed = page.execute_script(width)
    assert zoomed[0] < complete[0]
    press("0")
    assert page.execute_script(width) == complete


@pytest.mark.parametrize("width", [320, 400, 768])
def test_a_narrow_page_does_not_scroll_sideways(page: Any, width: int) -> None:
    """No content is wider than the window; wide tables scroll inside of themselves."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )
        found = "return [document.documentElement.scrollWidth, innerWidth]"
        scroll, inner = page.execute_script(found)
        assert scroll <= inner == width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.skipif(not AXE.is_file(), reason=f"{AXE} is missing: bash scripts/test_browser.sh")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_core_finds_nothing(page: Any, scheme: str) -> None:
    """axe-core finds no problem of any severity, in light and in dark."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
    page.set_script_timeout(60)
    page.execute_script(AXE.read_text("utf-8"))
    found = page.execute_async_script("axe.run().then(r => arguments[0](r.violations))")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert [
        (each["id"], each["nodes"][0]["html"][:200], each["nodes"][0]["failureSummary"])
        for each in found
    ] == []


def test_a_million_points_open_within_three_seconds(browser: Any, tmp_path: Path) -> None:
    """A page of a million points is drawn within three seconds of its load."""
    rng = random.Random(0)
    lines = (
        record(s, **{f"train/m{i}": rng.gauss(i, 1) for i in range(10)}) for s in range(100_000)
    )
    file = tmp_path / "page.html"
    file.write_text(render([write_metrics(tmp_path / "run", lines)]))
    began_at = time.monotonic()
    browser.get(file.as_uri())
    browser.execute_script("report.drawAll()")
    assert time.monotonic() - began_at < 3
    assert browser.execute_script("return report.charts.every(c => c.plot)")


def test_a_page_prints_all_curves_in_light(page: Any) -> None:
    """Printing opens all sections, draws all curves, and uses light colors."""
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    state = page.execute_script(
        "return [document.documentElement.dataset.theme, report.charts.every(c => c.plot), "
        "[...document.querySelectorAll('details')].every(d => d.open)]"
    )
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert state == ["light", True, True]
    assert len(page.execute_cdp_cmd("Page.printToPDF", {})["data"]) > 10_000
