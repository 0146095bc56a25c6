import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from scipy.special import softmax

from shufflenet_jax.commands import evaluate
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.report import summarise

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Run inside the page: what sticks out, and text whose contrast is below WCAG's AA.
CHECKS = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  const numbers = (color) => (color.match(/[0-9.]+/g) || []).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor, parts = numbers(color);
      if (parts.length === 3 || parts[3] === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const written = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const texts = [...document.querySelectorAll("body :not(script):not(title)")].filter(written);
  const faint = texts.filter((e) => {
    const style = getComputedStyle(e), svg = e.ownerSVGElement;
    const [a, b] = [light(svg ? style.fill : style.color), light(ground(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
  }).map((e) => e.textContent.slice(0, 30));
  const outside = (e) => !e.closest(".wide") && e.getBoundingClientRect().right > innerWidth + 0.5;
  const wide = [...document.querySelectorAll("body *")].filter(outside).map((e) => e.outerHTML.slice(0, 60));
  const found = { width: innerWidth, scroll: document.documentElement.scrollWidth, texts: texts.length, faint, wide,
    ground: getComputedStyle(document.body).backgroundColor };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
# A window is never narrower than 500 pixels; a frame may be.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<script>addEventListener("message", (event) => { document.documentElement.dataset.found = event.data; });</script>
<iframe src="page.html" width="WIDTH" height="900" frameborder="0"></iframe>
"""


def random_rows(seed=0, images=400, classes=12):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes)) + 2.0 * np.eye(classes)[labels] * (rng.random((images, 1)) < 0.8)
    return {"name": np.array([f"{i}.png" for i in range(images)]), "label": labels, "logits": np.float32(2 * logits)}


def assert_is_summary(summary, rows):
    """Every figure computed anew, in another way."""
    labels, probabilities = rows["label"], softmax(np.float64(rows["logits"]), axis=1)
    best, sure = probabilities.argmax(1), probabilities.max(1)
    wrong = best != labels
    assert summary.images == len(labels)
    in_five = [
        label in sorted(range(len(p)), key=lambda c: -p[c])[:5] for label, p in zip(labels, rows["logits"], strict=True)
    ]
    for share, right in ((summary.top1, (~wrong).sum()), (summary.top5, sum(in_five))):
        p, n, z = right / len(labels), len(labels), 1.959963984540054
        middle, half = (p + z**2 / (2 * n)), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        bounds = [100 * (middle - half) / (1 + z**2 / n), 100 * (middle + half) / (1 + z**2 / n)]
        assert share.right == right and [share.low, share.high] == pytest.approx(bounds, abs=1e-9)
    error = 0
    for number, found in enumerate(summary.bins):
        here = (sure >= number / 15) & ((sure < (number + 1) / 15) | (number == 14))
        assert found.images == here.sum()
        error += abs(sure[here].sum() - (~wrong)[here].sum()) / len(labels)
    assert summary.calibration_error == pytest.approx(100 * error, abs=1e-9)
    assert sum(row.images for row in summary.classes) == len(labels)
    for row in summary.classes:
        mine = labels == row.label
        assert (row.images, row.right) == (mine.sum(), (mine & ~wrong).sum())
        if row.taken_for is not None:
            counts = np.bincount(best[mine & wrong])
            assert counts[row.taken_for] == counts.max()
    shares = [row.right / row.images for row in summary.classes]
    assert shares == sorted(shares)
    for label, predicted, count in summary.confused:
        assert count == ((labels == label) & (best == predicted)).sum() and label != predicted
    surest = [mistake.place for mistake in summary.surest]
    assert set(surest) <= set(np.flatnonzero(wrong)) and len(surest) == min(12, wrong.sum())
    assert sure[wrong & ~np.isin(np.arange(len(labels)), surest)].max(initial=0) <= sure[surest].min(initial=1)


@pytest.mark.parametrize("seed", range(3))
def test_every_figure_of_a_summary_computed_anew(seed):
    rows = random_rows(seed)
    assert_is_summary(summarise(rows), rows)


def test_a_summary_where_all_is_right_names_no_mistakes():
    summary = summarise({"label": np.arange(3), "logits": np.eye(3)})
    assert summary.top1.percent == 100 and not summary.surest and not summary.confused
    assert all(row.taken_for is None for row in summary.classes)


@pytest.fixture(scope="module")
def page(ten_classes, tmp_path_factory):
    """The report of a small model."""
    model, data = ten_classes
    target = tmp_path_factory.mktemp("report") / "r.html"
    assert evaluate.main(["--checkpoint", str(model), "--data", str(data), "--report", str(target)]) == 0
    return target


def test_a_report_is_one_page_without_outside_resources(page, ten_classes, refused):
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "@import" not in text
    assert text.count("<figure>") == min(12, 12 - int(re.search(r"(\d+) of 12 right", text)[1]))
    assert "python eval.py --checkpoint" in text
    model, data = ten_classes
    where = model / "model.json/r.html"
    assert "cannot be written" in refused(evaluate.main, "--checkpoint", model, "--data", data, "--report", where)


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_and_is_readable_in_a_browser(page, tmp_path, width, dark):
    (tmp_path / "page.html").write_text(page.read_text().replace("</body>", CHECKS + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    words += ["--hide-scrollbars", "--window-size=1600,1000", f"--user-data-dir={tmp_path / 'user'}"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", frame.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r"data-found=\"([^\"]*)\"", done.stdout)[1].replace("&quot;", '"'))
    assert found["width"] == width and found["scroll"] <= width and not found["wide"], found
    assert found["texts"] > 40 and not found["faint"], found
    assert (found["ground"] == "rgb(255, 255, 255)") != dark


@pytest.mark.real_data
def test_the_report_of_the_real_weights_has_the_figures_of_their_predictions(shared, tmp_path, call):
    argv = ("--checkpoint", shared / "weights/shufflenet_v2_x1_0_mmpretrain.pth", "--data", shared / "imagenet-val227")
    keep = ("--report", tmp_path / "r.html", "--predictions", tmp_path / "p.npz")
    status, _, stderr = call(evaluate.main, *argv, *keep)
    assert status == 0, stderr
    rows = dict(np.load(tmp_path / "p.npz"))
    summary = summarise(rows)
    assert_is_summary(summary, rows)
    text = (tmp_path / "r.html").read_text()
    names = list(imagenet_classes().values())
    assert "466 of 650 right" in text and "592 of 650 right" in text
    assert f'id="ece">{summary.calibration_error:.2f} %' in text and 'id="loss">1.2544<' in text
    table = re.search(r'id="classes">(.*?)</tbody>', text, re.S)[1]
    told = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in table.splitlines() if "<td" in line]
    assert len(told) == len(summary.classes) == len(np.unique(rows["label"]))
    for cells, row in zip(told, summary.classes, strict=True):
        assert cells[:3] == [names[row.label].replace("'", "&#39;"), str(row.images), str(row.right)]
    assert text.count("data:image/jpeg") == 24
