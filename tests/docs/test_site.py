"""The built site in headless Chromium: console, search, width, downloads, dark mode, axe-core.

They skip themselves without Chromium and ChromeDriver, and the tests of accessibility without
axe-core; ``bash scripts/test_browser.sh`` installs all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="Selenium is missing: pip install selenium"
)
waiting = pytest.importorskip("selenium.webdriver.support.ui")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
AXE = Path(sys.prefix, "browser", "node_modules", "axe-core", "axe.min.js")  # in .venv
AXE = Path(os.environ.get("AXE_CORE", AXE))
LONGEST_S = 120
ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("[0-9]*.py"))
PAGES = [
    "index.html",
    "gallery/index.html",
    *(f"gallery/{name}.html" for name in TUTORIALS),
    "how_to/index.html",
    "how_to/resume.html",
    "how_to/hooks.html",
    "explanation/data_order.html",
    "reference/fields.html",
    "reference/hooks.html",
    "reference/channels.html",
    "reference/commands.html",
    "reference/errors.html",
    "reference/checkpoint_format.html",
    "api/robo_orchard_lab.pipeline.html",
    "project/security.html",
    "repository/tests/ports/gpt.py.html",
]
SIMILAR = {
    *(f"gallery/{name}.html" for name in TUTORIALS[2:]),
    "explanation/data_order.html",
    "how_to/index.html",
    "reference/errors.html",
    "reference/hooks.html",
    "project/security.html",
}
"""Pages with the elements of others."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a running headless Chromium."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium or ChromeDriver is missing: bash scripts/test_browser.sh")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tempfile.mkdtemp()
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    for flag in ("hide-scrollbars", "window-size=1280,1000", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(LONGEST_S)
    try:
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_error_and_no_sideways_scroll(browser: Any, site: Path, page: str) -> None:
    """The console stays empty, and at 400 pixels no content is wider than the window."""
    browser.get_log("browser")
    browser.get((site / page).as_uri())
    width = "return [document.documentElement.scrollWidth, innerWidth]"
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )
        scroll, inner = browser.execute_script(width)
        assert scroll <= inner == 400
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("resume", "how_to/resume.html"),
        ("KeepBest", "reference/hooks.html"),
        ("max_optimizer_step", "reference/fields.html"),
        ("CheckpointError", "reference/errors.html"),
        ("HookBasedTrainer", "api/robo_orchard_lab.pipeline.html"),
    ],
)
def test_the_search_finds(browser: Any, site: Path, words: str, page: str) -> None:
    """The search works from files, without a server, and lists the page."""
    browser.get((site / "search.html").as_uri() + f"?q={words}")
    done = "return Search.status?.innerText ?? ''"
    waiting.WebDriverWait(browser, LONGEST_S).until(
        lambda each: re.search(r"finished|did not match", each.execute_script(done))
    )
    links = browser.execute_script(
        "return [...document.querySelectorAll('#search-results a')].map(a => a.href)"
    )
    found = [link.partition("#")[0].partition("?")[0] for link in links]
    assert (site / page).as_uri() in found


@pytest.mark.parametrize("name", TUTORIALS)
def test_the_downloads_of_a_tutorial_exist(browser: Any, site: Path, name: str) -> None:
    """A tutorial has its program, its notebook and both in an archive, next to its output."""
    browser.get((site / "gallery" / f"{name}.html").as_uri())
    links = browser.execute_script(
        "return [...document.querySelectorAll('.sphx-glr-download a')].map(a => a.href)"
    )
    files = {Path(link.partition("#")[0].removeprefix("file://")) for link in links}
    assert {file.name for file in files} == {f"{name}.{kind}" for kind in ("py", "ipynb", "zip")}
    source = (ROOT / "docs" / "tutorials" / f"{name}.py").read_text("utf-8")
    for file in files:
        if file.suffix == ".py":
            assert file.read_text("utf-8").split() == source.split()
        elif file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                assert {f"{name}.py", f"{name}.ipynb"} <= {*archive.namelist()}
    assert browser.find_elements("css selector", ".sphx-glr-script-out")


def test_code_has_a_copy_button_and_the_footer_versions(browser: Any, site: Path) -> None:
    """A block of commands copies without its prompt, and the footer has the release."""
    browser.get((site / "how_to" / "command_line.html").as_uri())
    texts = browser.execute_script(
        "return [...document.querySelectorAll('.highlight-console, .highlight-text')].map(b => "
        "[b.querySelector('button.copybtn') !== null, b.innerText])"
    )
    assert texts
    assert all(has_button for has_button, _ in texts)
    release = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    footer = browser.find_element("css selector", ".versions").text
    versions = r"Python 3\.\S+, torch \d\S+, accelerate \d\S+, sphinx \d\S+"
    assert re.fullmatch(rf"robo-orchard-hooks {re.escape(release)}, {versions}", footer)


def test_dark_mode_follows_the_system_and_the_button(browser: Any, site: Path) -> None:
    """The page is dark with a dark system, and the button overrides the system."""
    browser.get((site / "index.html").as_uri())
    shades = []
    back = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        shades.append(int(browser.execute_script(back)))
    browser.find_element("css selector", ".theme-toggle-content button").click()  # light
    shades.append(int(browser.execute_script(back)))
    browser.execute_script("localStorage.removeItem('theme')")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    light, dark, chosen = shades
    assert light > 200 > 60 > dark
    assert chosen == light


@pytest.mark.skipif(not AXE.is_file(), reason=f"{AXE} is missing: bash scripts/test_browser.sh")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", [page for page in PAGES if page not in SIMILAR])
def test_axe_core_finds_nothing_serious(browser: Any, site: Path, page: str, scheme: str) -> None:
    """axe-core finds no problem that it calls serious or critical, in light and in dark."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get((site / page).as_uri())
    browser.execute_script(AXE.read_text("utf-8"))
    # Pictures and reports within a page have tests of their own.
    found = browser.execute_async_script(
        "axe.run({exclude: [['iframe']]}, {iframes: false}).then(r => arguments[0](r.violations))"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert [
        (each["id"], len(each["nodes"]), each["nodes"][0]["html"][:200])
        for each in found
        if each["impact"] in ("serious", "critical")
    ] == []


def test_every_page_of_a_folder_is_in_its_index() -> None:
    """Each guide and each explanation has a line in the index of its folder."""
    for folder in ("how_to", "explanation"):
        pages = {path.name for path in (ROOT / "docs" / folder).glob("*.md")} - {"index.md"}
        index = (ROOT / "docs" / folder / "index.md").read_text("utf-8")
        assert pages == {*re.findall(r"\]\((\w+\.md)\)", index)}, folder
