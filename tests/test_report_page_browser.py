"""The report page in headless Chromium, found by itself where it is installed, else skipped with the reason.

ONNXSLIM_LAB_BROWSER, the path of Chromium or 1, makes its absence a failure; chromedriver must be on the PATH
(Debian: `apt install chromium chromium-driver`). Neither can come from a Python package.
"""

import os
import shutil
from pathlib import Path

import measured_reports
import pytest
import report_pages

from onnxslim_lab.errors import one_line
from onnxslim_lab.report_page import Sources, render

WANTED = os.environ.get("ONNXSLIM_LAB_BROWSER", "")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NAMES = ("conv1", "conv2", "conv10", "fc")


@pytest.fixture(scope="module")
def driver():
    browser = shutil.which(WANTED) or next(filter(None, map(shutil.which, BROWSERS)), None)
    service = shutil.which("chromedriver")
    if browser is None or service is None:
        reason = "needs Chromium and chromedriver (Debian: chromium, chromium-driver)"
        if WANTED:
            pytest.fail(f"ONNXSLIM_LAB_BROWSER is set: {reason}")
        pytest.skip(reason)
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    found.set_script_timeout(30)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pages")
    long = tuple(f"/very/long/folder/of/a/model/block{i}/convolution_{'x' * 60}" for i in range(50))
    for name, sources in {
        "full": report_pages.full(),
        "hostile": report_pages.hostile(),
        "long": report_pages.full(long),
        "bare": Sources(gate=report_pages.gate()),
    }.items():
        (place / f"{name}.html").write_text(render(sources), encoding="utf-8")
    return place


@pytest.fixture
def show(driver, folder):
    """Return a function that loads a page and waits for its charts."""

    def load(name, *, width=1280, height=900, scheme="light"):
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700},
        )
        set_scheme(driver, scheme)
        driver.get(Path(folder / f"{name}.html").as_uri())
        return driver.execute_async_script(
            "const done = arguments[0], root = document.documentElement;"
            "const look = () => root.dataset.charts ? done(root.dataset.charts) : setTimeout(look, 20); look();"
        )

    return load


def set_scheme(driver, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def first_cells(driver, table="layer-table"):
    """Return the names of the rows that are shown, in order."""
    return driver.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].filter(row => !row.hidden)"
        ".map(row => row.cells[0].firstChild.textContent.trim())",
        table,
    )


def header(driver, number, table="layer-table"):
    return driver.find_element("css selector", f"#{table} thead th:nth-child({number})")


@pytest.mark.parametrize(
    ("name", "charts"), [("full", "drawn"), ("hostile", "drawn"), ("long", "drawn"), ("bare", "none")]
)
def test_loads_without_errors_or_network(driver, show, name, charts):
    assert show(name) == charts
    assert driver.get_log("browser") == []
    fetched = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert not [url for url in fetched if not url.startswith(("data:", "blob:"))]
    drawn = driver.execute_script("return document.querySelectorAll('.chart .main-svg').length > 0")
    assert drawn == (charts == "drawn")


def test_what_the_commands_write(driver, show, folder, zoo):
    import zoo as models
    from conftest import real

    _, _, images, labels = real(models.mnist)
    paths = measured_reports.measure(folder, zoo("lenet5"), images[:100], labels[:100])
    (folder / "real.html").write_text(render(measured_reports.sources(paths)), encoding="utf-8")
    assert show("real") == "drawn"
    assert driver.get_log("browser") == []
    sizes = "return [...document.querySelectorAll('#layer-table tbody tr')].map(row => row.cells[1].textContent.trim())"
    assert driver.execute_script(sizes)[:4] == ["2,000", "100,000", "1,600,000", "20,000"]
    header(driver, 2).find_element("tag name", "button").click()
    assert driver.execute_script(sizes)[:4] == ["2,000", "20,000", "100,000", "1,600,000"]
    driver.find_element("id", "gate-table-search").send_keys("undecided agreement")
    assert first_cells(driver, "gate-table") == ["agreement.least"]
    for width in (360, 1280):
        show("real", width=width, height=700)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script("return document.querySelectorAll('.chart .main-svg').length") >= 3


def test_the_console_is_watched(driver, show):
    show("bare")
    driver.execute_script("setTimeout(() => { throw new Error('made on purpose'); })")
    driver.execute_async_script("setTimeout(arguments[0], 50)")
    assert "made on purpose" in str(driver.get_log("browser"))


def test_numbers_sort_as_numbers_and_empty_cells_last(driver, show):
    show("full")
    head = header(driver, 2)
    assert head.get_attribute("aria-sort") == "none"
    head.find_element("tag name", "button").click()
    assert (first_cells(driver), head.get_attribute("aria-sort")) == (list(NAMES), "ascending")
    head.find_element("tag name", "button").click()
    assert (first_cells(driver), head.get_attribute("aria-sort")) == (list(NAMES)[::-1], "descending")
    header(driver, 2, "sensitivity-table").find_element("tag name", "button").click()
    negative = first_cells(driver, "sensitivity-table")
    assert negative == list(NAMES)[::-1]  # -29 before -20
    rank = header(driver, 6).find_element("tag name", "button")
    for _ in range(2):
        rank.click()
        assert first_cells(driver)[0] == "conv1"  # the only one with a rank
    assert head.get_attribute("aria-sort") == "none"


def test_sorting_by_keyboard(driver, show):
    from selenium.webdriver.common.keys import Keys

    show("full")
    field = driver.find_element("id", "layer-table-search")
    field.send_keys(Keys.TAB, Keys.NULL)  # the scrolling region
    driver.switch_to.active_element.send_keys(Keys.TAB)
    button = driver.switch_to.active_element
    assert button.tag_name == "button"
    assert button.value_of_css_property("outline-style") == "solid"
    button.send_keys(Keys.ENTER)
    assert first_cells(driver) == ["conv1", "conv2", "conv10", "fc"]  # 10 after 2
    button.send_keys(Keys.SPACE)
    assert first_cells(driver) == ["fc", "conv10", "conv2", "conv1"]


def test_filtering_needs_every_word_and_counts(driver, show):
    from selenium.webdriver.common.keys import Keys

    show("full")
    field = driver.find_element("id", "layer-table-search")
    count = driver.find_element("id", "layer-table-count")
    assert count.text == "4 of 4"
    field.send_keys("CONV1 share")
    assert (first_cells(driver), count.text) == (["conv1", "conv10"], "2 of 4")
    header(driver, 2).find_element("tag name", "button").click()
    header(driver, 2).find_element("tag name", "button").click()
    assert first_cells(driver) == ["conv10", "conv1"]
    field.send_keys(" nothing of this kind")
    assert (first_cells(driver), count.text) == ([], "0 of 4")
    field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    assert len(first_cells(driver)) == 4


def test_hostile_names_show_as_text(driver, show):
    show("hostile")
    assert driver.execute_script(
        "return [document.scripts.length, document.querySelectorAll('b').length]"
    ) == [4, 0]
    shown = driver.execute_script(
        "return [...document.querySelectorAll('#layer-table tbody th')].map(cell =>"
        " (cell.querySelector('.whole') ?? cell).textContent.trim().replace(/ Conv$/, ''))"
    )
    assert shown == [one_line(name, 1 << 20) for name in report_pages.NASTY]
    labels = driver.execute_script(
        "return [...document.querySelectorAll('#heat-map .ytick text')].map(text => text.textContent)"
    )
    assert "<script>" in " ".join(labels)
    assert "<b>bold</b>" in labels
    assert "&lt;/" not in " ".join(labels)
    assert not driver.execute_script("return document.querySelectorAll('.chart a, .chart script').length")


@pytest.mark.parametrize("name", ["full", "hostile", "long", "bare"])
def test_the_page_never_scrolls_sideways(driver, show, name):
    show(name, width=320, height=700)
    for width in (320, 1280, 360):  # charts must shrink, too
        metrics = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 700}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.execute_async_script("setTimeout(arguments[0], 250)")
        wide, inner = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert inner == width
        assert wide <= width
        charts = driver.execute_script(
            "return [...document.querySelectorAll('.chart')].map(chart =>"
            " [chart.clientWidth, chart.querySelector('.main-svg').getBoundingClientRect().width])"
        )
        assert all(abs(outer - drawn) < 2 for outer, drawn in charts)


def colours(driver):
    return driver.execute_script(
        "const style = getComputedStyle(document.body);"
        "const tick = document.querySelector('#waterfall .ytick text');"
        "return [style.backgroundColor, style.color, getComputedStyle(tick).fill]"
    )


def luminance(colour):
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_dark_and_light_are_readable_and_charts_follow(driver, show):
    show("full", scheme="dark")
    dark = colours(driver)
    assert luminance(dark[0]) < 0.05
    set_scheme(driver, "light")
    driver.execute_async_script("setTimeout(arguments[0], 400)")
    light = colours(driver)
    assert luminance(light[0]) > 0.9
    assert light[2] != dark[2]
    for scheme in ("dark", "light"):
        show("full", scheme=scheme)
        pairs = driver.execute_script(
            "const back = element => { for (let at = element; at; at = at.parentElement) {"
            " const found = getComputedStyle(at).backgroundColor;"
            " if (!found.startsWith('rgba(0, 0, 0, 0')) return found; } };"
            "return [...document.querySelectorAll('h1, h2, a, th, td, .badge, .note, .why, dt, button, .tool')]"
            ".map(element => [getComputedStyle(element).color, back(element)])"
        )
        assert len(pairs) > 100
        assert min(contrast(*pair) for pair in {tuple(pair) for pair in pairs}) >= 4.5
        assert contrast(colours(driver)[2], colours(driver)[0]) >= 4.5
