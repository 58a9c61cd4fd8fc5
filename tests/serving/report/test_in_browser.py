"""The pages in a real browser: what axe-core finds in them, at a desk, on a phone, light and dark, and on paper."""

import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from serving.report.curve import render_curve
from serving.report.render import render_report
from tests.serving.decision.making import candidate
from tests.serving.report.test_decision import good, written
from tests.serving.report.test_quality import document
from tests.serving.report.test_render import write_plan, write_summary, write_sweep, write_verification
from toolchain.plan.plan import load_sweep

pytestmark = pytest.mark.acceptance

SWEEP = Path(__file__).parents[2] / "fixtures" / "written" / "sweep"
WIDTHS = (1280, 390)
# Two frames of the same page, since a window of Chromium's is at least 500 pixels wide. All that is folded is opened.
FRAMES = "<title>Frames</title><body style='margin:0'>" + "".join(
    f"<iframe src='page.html' style='border:0;width:{width}px;height:900px'></iframe>" for width in WIDTHS
)
CHECK = """
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  setTimeout(async () => {
    const found = await axe.run(document);
    const told = parent.document.createElement("pre");
    told.textContent = JSON.stringify({
      width: innerWidth, needs: document.documentElement.scrollWidth, passes: found.passes.length,
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
      violations: found.violations.map(
        (each) => `${each.impact} ${each.id}: ${each.nodes.map((node) => node.html.slice(0, 150))}`),
    });
    parent.document.body.append(told);
  }, 500);
});
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every page that the product writes, each with all of its parts."""
    place = tmp_path_factory.mktemp("pages")
    measured = place / "measured"
    measured.mkdir()
    write_plan(measured, for_a_target=True)
    write_summary(measured)
    document().save(measured)
    write_verification(measured / "onnx", passed=False)
    write_sweep(measured / "sweep")
    decided = place / "decided"
    decided.mkdir()
    lost = candidate("50 %", gain=None, not_measured="It was too much.")
    written(decided, *good(), lost, guard_rails={"most_perplexity": 1.2, "groups": {"safety": 0.9}})
    for language in ("en", "ja"):
        render_report([measured], place / f"report-{language}.html", language=language)
        render_report([decided, measured], place / f"decision-{language}.html", language=language)
    render_curve(load_sweep(SWEEP), place / "curve-en.html")
    return {each.stem: each for each in place.glob("*.html")}


def chromium(place: Path, *options: str) -> str:
    """What Chromium prints; skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={place / 'profile'}",
               "--virtual-time-budget=30000", *options]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def axe_core() -> str:
    """axe-core itself, which this package brings along; its own driver is not used."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core is not installed: pip install -e '.[report-validators]'")
    return Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["decision-en", "decision-ja", "report-en", "report-ja", "curve-en"])
def test_axe_finds_nothing_and_the_page_is_no_wider_than_its_window(pages, name, scheme, tmp_path):
    page, _, end = pages[name].read_text(encoding="utf-8").rpartition("</body>")
    checks = f"<script>{axe_core()}</script><script>{CHECK}</script></body>"
    (tmp_path / "page.html").write_text(page + checks + end, encoding="utf-8")
    (tmp_path / "frames.html").write_text(FRAMES, encoding="utf-8")
    dumped = chromium(
        tmp_path, "--allow-file-access-from-files", "--window-size=1700,900", "--dump-dom",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", (tmp_path / "frames.html").as_uri(),
    )  # fmt: skip
    told = [json.loads(html.unescape(each)) for each in re.findall(r"<pre>(.*?)</pre>", dumped, re.DOTALL)]
    assert sorted(each["width"] for each in told) == sorted(WIDTHS)
    for each in told:
        assert each["dark"] == (scheme == "dark") and each["passes"] > 15
        assert each["violations"] == [], f"{each['width']} pixels"
        assert each["needs"] <= each["width"]


def test_it_prints_on_a4(pages, tmp_path):
    out = tmp_path / "page.pdf"
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={out}", pages["decision-en"].as_uri())
    sheets = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", out.read_bytes())
    assert sheets and {(round(float(wide)), round(float(high))) for wide, high in sheets} == {(595, 842)}
