"""The page of edm2 report in a browser: charts, slider, contrast, and that it follows a run."""

import json
import shutil
from threading import Thread

import pytest
from report_runs import edit_config, report

from backends.commands.report import Report
from backends.pipeline.report.sections import Sampling
from backends.pipeline.report.serve import Live, open_server
from backends.pipeline.runs.folder import Run

NO_SAMPLES = Sampling(sigma_rels=None, seeds=[0], steps=2, open_port=None)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


pytestmark = pytest.mark.usefixtures("toy_reports")


@pytest.fixture
def run(trained, tmp_path):
    return Run(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser_the_slider_moves_the_pictures_and_nothing_sticks_out(
    run, trained, tmp_path, browser, width, scheme
):
    other = shutil.copytree(trained, tmp_path / ("averylongnameofarun" * 8))
    edit_config(Run(other), lr=0.25)
    assert report(run.path, other, "--sigma-rels", 0.05, 0.1, 0.2) == 0
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    faults, asked = [], []
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"file://{tmp_path}/report/report.html")

    def shown():
        return tab.locator("[data-length]:visible").evaluate_all("elements => elements.map(e => e.dataset.length)")

    assert shown() == ["0.1", "0.1"]
    slider = tab.locator("#length")
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert shown() == ["0.2", "0.2"]
    assert tab.locator("output").inner_text() == slider.get_attribute("aria-valuetext") == "0.2"
    tab.keyboard.press("Home")
    assert shown() == ["0.05", "0.05"]
    box = slider.bounding_box()
    tab.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    assert shown() == ["0.2", "0.2"]
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = tab.evaluate(
        "['--dim', '--bg'].map(n => getComputedStyle(document.documentElement).getPropertyValue(n))"
    )
    assert contrast(ink, paper) > 4.5  # WCAG AA
    assert faults == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    tab.close()


def contrast(*colours):
    """Of two colours, #rgb or #rrggbb. Source: WCAG 2.2."""

    def luminance(colour):
        digits = colour.strip().lstrip("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        linear = [(x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4) for x in map(_unit, _pairs(digits))]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _pairs(digits):
    return [digits[i : i + 2] for i in range(0, 6, 2)]


def _unit(pair):
    return int(pair, 16) / 255


def test_in_a_browser_charts_answer_the_keyboard_and_lines_can_be_hidden(run, tmp_path, browser):
    for i, record in enumerate(history := list(run.telemetry())):
        for block in record["blocks"].values():
            block["activation_max"] = 1.0 + i
    run.telemetry_path.write_text("".join(f"{json.dumps(record)}\n" for record in history))
    assert report(run.path, "--no-samples") == 0
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(f"file://{tmp_path}/run/report/report.html")
    chart = tab.locator("figure.lines", has_text="Activations, maximum")
    chart.locator(".plot").focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert chart.locator(".plot").get_attribute("data-at") == "images seen: 512"
    first = chart.locator(".legend button").first
    assert first.inner_text().endswith("3")
    first.click()
    assert first.get_attribute("aria-pressed") == "false"
    log = chart.locator(".log")
    assert log.get_attribute("aria-pressed") == "true"
    before = chart.locator("canvas").evaluate("canvas => canvas.toDataURL()")
    log.click()
    assert chart.locator("canvas").evaluate("canvas => canvas.toDataURL()") != before
    tab.close()


def test_a_served_page_follows_the_run(run, browser):
    def made(version=None):
        return Report({"run": run}, run.path / "report", NO_SAMPLES).html(version)

    def version():
        return Report({"run": run}, run.path / "report", NO_SAMPLES).version()

    with open_server(Live(made, version), 0) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            tab = browser.new_page()
            tab.goto(f"http://127.0.0.1:{server.server_address[1]}/")
            assert "4,096 of 4,096 images" in tab.locator(".cards").inner_text()
            run.append_log(run.log()[-1] | {"nimg": 5120})
            tab.wait_for_function("document.querySelector('.cards').innerText.includes('5,120')", timeout=20_000)
            tab.close()
        finally:
            server.shutdown()
            thread.join()
