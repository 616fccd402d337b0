"""The page in a real headless Chromium, on a desk and on a phone: no complaint, no missing figure, nothing too wide."""

import pytest
from chromium import PROGRAM, Chromium
from written import dataset, results, save, write_run

from mmtard.report.page import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; on Debian: apt-get install chromium"),
]

WIDTHS = (1280, 390)
BROKEN = (
    '<p>x</p><script>console.error("told")</script><img src="data:image/png;base64,AAAA">'
    '<div style="width: 2000px">wide</div><img src="https://example.invalid/x.png">'
)


@pytest.fixture(scope="module")
def browser():
    with Chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs with long names, two datasets, one with a long name, and two radii."""
    folder, paths = tmp_path_factory.mktemp("browser"), []
    for name, robust in (("vitb32_mmtard_confidence_sigmoid_with_a_long_name", 6), ("baseline", 4)):
        run = write_run(folder / name)
        flags = [i < robust for i in range(10)]
        parts = [
            dataset(n, [True] * 8 + [False] * 2, {"2/255": flags, "4/255": flags})
            for n in ("Caltech101", "A-dataset-whose-name-is-longer-than-a-phone-is-wide")
        ]
        save(results(parts, str(run), name), run / "evaluations" / "fare")
        paths.append(run)
    return report(paths, folder / "out", images=0)


def looked_at(browser, path, width):
    """What the browser found: (complaints, addresses asked for, images, those that are there, pixels outside)."""
    browser.complaints.clear()
    browser.asked.clear()
    browser.open(path, width)
    images = browser.value("document.images.length")
    there = browser.value(
        "Array.from(document.images).filter(image => image.complete && image.naturalWidth > 0).length"
    )
    outside = browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return list(browser.complaints), [a for a in browser.asked if not a.startswith("data:")], images, there, outside


@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_finds_nothing_wrong(browser, page, width):
    complaints, asked, images, there, outside = looked_at(browser, page, width)
    assert complaints == [] and asked == [page.resolve().as_uri()]
    assert images == there == len(list(page.parent.glob("*.png"))) >= 15
    assert outside == 0
    fonts = browser.value(
        "Array.from(document.querySelectorAll('p, td, th, li, figcaption, small'))"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(fonts) >= 12
    widths = browser.value("Array.from(document.images).map(image => image.getBoundingClientRect().width)")
    assert min(widths) > 300 and max(widths) <= width  # a panel of 4.4 inches: its 9 pt are legible at that size


def test_every_heading_is_reached_from_the_contents(browser, page):
    browser.open(page, 390)
    links = "Array.from(document.querySelectorAll('nav a'))"
    dead = f"{links}.filter(a => !document.querySelector(a.getAttribute('href'))).length"
    assert (
        browser.value("document.querySelectorAll('nav a').length") == 6 and browser.value(dead) == 0
    )  # nothing is missing, no images


def test_light_and_dark_are_both_legible(browser, page):
    browser.open(page, 1280)
    colours = "['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k])"
    seen = {}
    for dark in (False, True):
        browser.dark(dark)
        seen[dark] = [
            sum(map(int, c.removeprefix("rgb(").removesuffix(")").split(","))) for c in browser.value(colours)
        ]
    browser.dark(False)
    assert seen[False][0] - seen[False][1] > 450 and seen[True][1] - seen[True][0] > 450


def test_the_browser_does_see_what_would_be_wrong(browser, tmp_path):
    """The control of the tests above: each finding is found on a page that has it."""
    path = tmp_path / "broken.html"
    path.write_text(
        "<!DOCTYPE html><html><head><meta name=viewport content='width=device-width'></head>"
        f"<body>{BROKEN}</body></html>"
    )
    complaints, asked, images, there, outside = looked_at(browser, path, 390)
    assert any("told" in c for c in complaints) and "https://example.invalid/x.png" in asked
    assert images == 2 and there == 0 and outside > 0
