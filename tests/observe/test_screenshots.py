"""The report as a browser shows it: at the width of a phone and of a desk, light and dark.

To look at them: `SCREENSHOTS=/tmp/shots pytest -m slow tests/observe/test_screenshots.py`.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from synthetic_cluster import write_rich_run

from phi3v_dist.observe.compare import write_comparison
from phi3v_dist.observe.report import write_changes, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
SIZES = {"phone": 390, "desktop": 1280}
MEASURE = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => { one.open = true; });
  const width = document.documentElement.clientWidth;
  const inScroller = one => one.closest(".scroll");
  const name = one => `${one.tagName} ${one.getAttribute("class")}: ${one.textContent.trim().slice(0, 40)}`;
  const wide = [...document.querySelectorAll("body *")].filter(one => !inScroller(one)
    && one.getBoundingClientRect().width && one.getBoundingClientRect().right > width + 1).map(name);
  const small = [...document.querySelectorAll("figure svg text")].filter(
    one => one.getBoundingClientRect().height && one.getBoundingClientRect().height < 8 && one.textContent.trim()
    && getComputedStyle(one).transform === "none").map(name);
  const overlapping = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const isTurned = one => /rotate\\((?!-?0\\b)/.test(one.getAttribute("transform") || "");
    const labels = [...svg.querySelectorAll("text")].filter(one => one.textContent.trim() && !isTurned(one));
    const boxes = labels.map(one => one.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 2 && y > 4) overlapping.push(svg.closest("figure").querySelector("strong").textContent + ": "
        + labels[i].textContent + " | " + labels[i + 1 + j].textContent);
    }));
  }
  const found = {width, scrollWidth: document.documentElement.scrollWidth, wide, small, overlapping};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""

FRAME = """<!doctype html><title>waiting</title>
<script>addEventListener("message", event => { document.title = "measured " + event.data; });</script>
<iframe src="%s" width="%d" height="2000" style="border: 0"></iframe>
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    runs = [write_rich_run(root / name, num_samples=60) for name in ("a_run_with_a_name_of_some_length", "another")]
    report = write_report(runs[0])
    pages = {"report": report, "comparison": write_comparison(runs), "answers": report.with_name("answers.html")}
    first = runs[0] / "eval" / "step-000150"
    return pages | {"changes": write_changes(first, runs[0], report.with_name("changes.html"))}


def browse(page: Path, width: int, height: int, *options: str) -> str:
    """What headless Chromium prints."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--virtual-time-budget=5000", f"--user-data-dir={page.parent / 'chromium'}",
        f"--window-size={width},{height}", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(page: Path, width: int) -> dict[str, Any]:
    """What a browser says of the page at this width, with everything unfolded."""
    inner, outer = (page.with_name(f"{what}_{page.stem}_{width}.html") for what in ("measured", "framed"))
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    inner.write_text(policy.sub("", page.read_text()).replace("</head>", f"{MEASURE}</head>"))
    outer.write_text(FRAME % (inner.name, width))  # a window is at least 500 pixels wide, a frame is not
    printed = browse(outer, 1400, 2000, "--dump-dom")
    title = re.search("<title>measured (.*?)</title>", printed, re.DOTALL)
    assert title, printed[:500]
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["report", "comparison", "answers", "changes"])
def test_no_element_is_wider_than_the_screen_and_no_label_covers_another(
    pages: dict[str, Path], which: str, size: str
) -> None:
    found = measured(pages[which], SIZES[size])
    assert found["width"] == SIZES[size]
    assert found["scrollWidth"] <= found["width"]
    assert found["wide"] == [] and found["small"] == [] and found["overlapping"] == []


CLICK = """
<script>
addEventListener("load", () => {
  const heads = [...document.querySelectorAll("thead button")], type = words => {
    const box = document.querySelector(".search input");
    box.value = words;
    box.dispatchEvent(new Event("input"));
  };
  const keys = () => [...document.querySelectorAll("tbody tr")].filter(one => !one.hidden).map(
    one => one.cells[heads.findIndex(head => head.textContent === "price: error")].textContent);
  const found = {};
  type("coats NAVY");
  found.searched = document.querySelector("output").textContent;
  type("");
  const price = heads.find(head => head.textContent === "price: error");
  price.click();
  found.rising = keys();
  price.click();
  found.falling = keys();
  document.title = "measured " + JSON.stringify(found);
});
</script>
"""


def test_the_script_of_the_table_runs_searches_and_sorts(pages: dict[str, Path]) -> None:
    page = pages["answers"]
    assert "<output>60 of 60</output>" in browse(page, 1280, 2000, "--dump-dom"), "its digest is the policy's"
    hostile = page.with_name("hostile.html")
    hostile.write_text(page.read_text().replace("</body>", "<script>document.title = 'ran'</script></body>"))
    assert "<title>ran" not in browse(hostile, 1280, 2000, "--dump-dom"), "no other script runs"
    clicked = page.with_name("clicked.html")
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    clicked.write_text(policy.sub("", page.read_text()).replace("</head>", f"{CLICK}</head>"))
    title = re.search("<title>measured (.*?)</title>", browse(clicked, 1280, 2000, "--dump-dom"), re.DOTALL)
    assert title
    found = json.loads(html.unescape(title[1]))
    num_found = int(found["searched"].split(" of ")[0])
    assert 0 < num_found < 30
    numbers = [float(text) for text in found["rising"] if text]
    assert numbers == sorted(numbers) and len(found["rising"]) == 60
    assert [float(text) for text in found["falling"] if text] == numbers[::-1]


def test_a_page_that_is_too_wide_for_a_phone_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "wide.html"
    page.write_text('<!doctype html><html><head></head><body><p style="width: 500px">wide</p></body></html>')
    found = measured(page, SIZES["phone"])
    assert found["wide"] == ["P null: wide"] and found["scrollWidth"] > found["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_taken_at_both_widths_and_the_page_follows_the_scheme(
    pages: dict[str, Path], tmp_path: Path, size: str, scheme: str
) -> None:
    from PIL import Image

    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for which, page in pages.items():
        target = folder / f"{which}_{size}_{scheme}.png"
        prefers = "0" if scheme == "dark" else "1"
        height = 9000 if size == "desktop" else 24000
        browse(page, SIZES[size], height, f"--screenshot={target}", f"--blink-settings=preferredColorScheme={prefers}")
        with Image.open(target) as picture:
            assert picture.width == SIZES[size]
            corner = picture.convert("L").getpixel((2, 2))
            assert isinstance(corner, int) and (corner < 60) == (scheme == "dark")
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50
