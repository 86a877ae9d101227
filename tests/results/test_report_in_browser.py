"""The report in a browser: at a phone's width and a screen's, by day, by night and in print."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.browser import CHROMIUM, Tab, chromium
from helpers.results import RESULTS, read
from localgrad.results.report import page

IMAGES = """Promise.all([...document.querySelectorAll('svg image, img')].map(async (element) => {
  const image = new Image();
  image.src = element.getAttribute('href') || element.getAttribute('xlink:href') || element.src;
  try { await image.decode(); } catch { return 0; }
  return image.naturalWidth;
}))"""


PICTURES = """[...document.querySelectorAll('figure > svg')].map((svg) => {
  const box = svg.getBoundingClientRect();
  return [box.width, box.height, svg.querySelectorAll('path, image, use, text').length];
})"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no chromium in PATH: the page was not looked at in a browser")
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def written(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report.html"
    output.write_text(text)
    return output


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
def test_a_browser_shows_the_page_without_a_complaint(tab: Tab, written: Path, width: int, dark: bool) -> None:
    tab.open(written, width=width, dark=dark)
    assert tab.complaints() == []
    assert tab.requests() == []
    assert tab.run("document.compatMode") == "CSS1Compat"
    assert tab.run("document.documentElement.scrollWidth") <= width
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") <= width
    tables = "[...document.querySelectorAll('.wide')].filter((each) => !each.closest('#files'))"
    beyond = tab.run(f"{tables}.map((each) => each.scrollWidth - each.clientWidth)")
    assert len(beyond) >= 8
    assert max(beyond) == 0, "no table but that of the files needs to be scrolled"
    loaded = tab.run(IMAGES)
    assert len(loaded) >= 10
    assert min(loaded) > 0
    for box in tab.run(PICTURES):
        assert box[0] > 200, box
        assert box[1] > 100, box
        assert box[2] > 10, box
    assert tab.complaints() == []


def test_words_of_the_findings_lie_beside_each_other_on_a_phone(tab: Tab, written: Path) -> None:
    tab.open(written, width=400)
    cells = "[...document.querySelectorAll('table.cards td')].filter((each) => each.clientHeight)"
    beyond = tab.run(f"{cells}.map((each) => each.scrollHeight - each.clientHeight)")
    assert len(beyond) > 4 and max(beyond) <= 0, "a label that is longer than its value ends above the next one"


def test_ink_and_paper_differ_by_day_by_night_and_in_print(tab: Tab, written: Path) -> None:
    body = "getComputedStyle(document.body)"
    texts = "[...document.querySelectorAll('svg text')].map((text) => getComputedStyle(text).fill)"
    on_colors = {"rgb(255, 255, 255)", "rgb(17, 17, 17)"}  # figures in the fields of a map
    seen = {}
    for name, look in {"day": {}, "night": {"dark": True}, "print": {"dark": True, "media": "print"}}.items():
        tab.open(written, **look)
        paper, ink, letters = tab.run(f"[{body}.backgroundColor, {body}.color, {texts}]")
        assert {*letters} - on_colors == {ink}, "pictures take the ink of the page"
        seen[name] = _brightness(paper), _brightness(ink)
    assert seen["day"][0] > 230 > 60 > seen["day"][1]
    assert seen["night"][0] < 60 < 200 < seen["night"][1]
    assert seen["print"] == seen["day"]


def _brightness(color: str) -> float:
    return statistics.fmean(map(float, re.findall(r"[\d.]+", color)[:3]))


def test_the_browser_would_complain(tab: Tab, written: Path, tmp_path: Path) -> None:
    """What the tests above look for is seen where it is there."""
    text = written.read_text()
    bad = '<img src="https://localhost:9/x.png"><script>1</script><div style="width: 900px">wide</div>'
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("</main>", f"{bad}</main>"))
    tab.open(broken, width=390)
    assert len(tab.complaints()) >= 2
    assert tab.run("document.documentElement.scrollWidth") > 390
    free = tmp_path / "free.html"
    free.write_text(re.sub(r"<meta http-equiv.*?>", "", broken.read_text()))
    tab.open(free)
    assert tab.requests() == ["https://localhost:9/x.png"]
    assert 0 in tab.run(IMAGES)


def test_the_results_of_this_repository_take_four_screens_before_the_details(tab: Tab, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    output.write_text(page(read(RESULTS)[0], RESULTS))
    tab.open(output, width=1280)
    details = "document.querySelector('#details')"
    assert tab.run(f"{details}.getBoundingClientRect().top + scrollY") <= 4 * tab.run("innerHeight")
    assert tab.run(f"[...{details}.querySelectorAll('details')].some((each) => each.open)") is False


def test_a_link_of_the_contents_opens_what_it_leads_to(tab: Tab, written: Path) -> None:
    tab.open(written, width=1280)
    target = "document.querySelector('#table-1')"
    assert tab.run(f"{target}.checkVisibility()") is False
    tab.run("document.querySelector('nav a[href=\"#table-1\"]').click()")
    tab.run("new Promise((done) => setTimeout(done, 200))")
    assert tab.run(f"{target}.checkVisibility()") is True
    assert abs(tab.run(f"{target}.getBoundingClientRect().top")) < 100
    tab.run(f"{target}.querySelector('tbody th a').click()")
    tab.run("new Promise((done) => setTimeout(done, 200))")
    assert "localgrad train" in tab.run("document.querySelector(':target').textContent")
