import base64
import html
import io
import json
import re
import subprocess
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from matplotlib import colormaps
from page_checks import READABILITY
from PIL import Image
from scipy.special import log_softmax, softmax
from sklearn.metrics import precision_recall_fscore_support

from shufflenet_jax.commands import evaluate
from shufflenet_jax.config import MEGVII_EVAL, TORCHVISION_EVAL_LARGE
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.evaluation.predictions import Predictions, read_predictions
from shufflenet_jax.evaluation.report import in_words, make_report, summarise
from shufflenet_jax.exports import browser
from shufflenet_jax.inference import Model
from shufflenet_jax.loading import load_model

BROWSER = browser.find()
# Run inside the page: what sticks out, texts and shapes whose contrast is below WCAG's AA, what no key reaches.
CHECKS = (
    """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
"""
    + READABILITY
    + """  const texts = [...document.querySelectorAll("body :not(script):not(title)")].filter(written);
  const faint = texts.filter((e) => {
    const style = getComputedStyle(e);
    return contrast(e.ownerSVGElement ? style.fill : style.color, ground(e)) < 4.5;
  }).map((e) => e.textContent.slice(0, 30));
  const [halo, ideal, ...bars] = ["#halo", "#ideal", "rect"].flatMap((name) => [...document.querySelectorAll(name)])
    .map((e) => getComputedStyle(e));
  const drawn = [[ideal.stroke, halo.stroke], ...bars.map((bar) => [bar.fill, ground(document.body)])];
  const lines = { faint: drawn.filter((colors) => contrast(...colors) < 3), bars: bars.length,
    margin: (parseFloat(halo.strokeWidth) - parseFloat(ideal.strokeWidth)) / 2 };
  const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const stops = [...document.querySelectorAll("body *")].filter((e) => e.matches("summary") || scrolls(e));
  const unseen = stops.filter((e) => {
    e.focus();
    const style = getComputedStyle(e), outlined = style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2;
    // Chromium's own scrolling regions can be focused whatever tabIndex says; other browsers' cannot.
    const reached = document.activeElement === e && e.tabIndex === 0;
    return !reached || !outlined || contrast(style.outlineColor, ground(e)) < 3;
  }).map((e) => e.outerHTML.slice(0, 60));
  const outside = (e) => !e.closest(".wide") && e.getBoundingClientRect().right > innerWidth + 0.5;
  const wide = [...document.querySelectorAll("body *")].filter(outside).map((e) => e.outerHTML.slice(0, 60));
  const found = { width: innerWidth, scroll: document.documentElement.scrollWidth, texts: texts.length, faint, wide,
    lines, stops: stops.length, unseen,
    ground: getComputedStyle(document.body).backgroundColor };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
)
# A window is never narrower than 500 pixels; a frame may be.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<script>addEventListener("message", (event) => { document.documentElement.dataset.found = event.data; });</script>
<iframe src="page.html" width="WIDTH" height="900" frameborder="0"></iframe>
"""


def random_rows(seed=0, images=400, classes=12):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes)) + 2.0 * np.eye(classes)[labels] * (rng.random((images, 1)) < 0.8)
    return Predictions(labels, np.float32(2 * logits), np.array([f"{i}.png" for i in range(images)]))


Z = 1.959963984540054  # Between -Z and Z lie 95 % of the normal distribution.


def anew(rows):
    """Every figure of a report, computed in another way."""
    labels, probabilities = rows.label, softmax(np.float64(rows.logits), axis=1)
    best, sure, count = probabilities.argmax(1), probabilities.max(1), len(labels)
    wrong = best != labels
    in_five = [
        label in sorted(range(len(p)), key=lambda c: -p[c])[:5] for label, p in zip(labels, rows.logits, strict=True)
    ]
    losses = -log_softmax(np.float64(rows.logits), axis=1)[np.arange(count), labels]
    half = Z * losses.std(ddof=1) / np.sqrt(count)
    bins = []
    for number in range(15):
        here = (sure >= number / 15) & ((sure < (number + 1) / 15) | (number == 14))
        means = (sure[here].mean(), 1 - wrong[here].mean()) if here.any() else (0, 0)
        bins.append((number, here.sum(), *means))
    classes = []
    for label in np.unique(labels):
        mine = labels == label
        counts = np.bincount(best[mine & wrong], minlength=1)
        often = set(np.flatnonzero(counts == counts.max())) if counts.max() else {None}
        classes.append((label, mine.sum(), (mine & ~wrong).sum(), often))
    pairs, counts = np.unique(np.stack([labels, best], 1)[wrong], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:20]
    return SimpleNamespace(
        images=count,
        top1=share((~wrong).sum(), count),
        top5=share(sum(in_five), count),
        loss=(losses.mean(), max(0, losses.mean() - half), losses.mean() + half),
        calibration_error=100 * sum(images * abs(right - mean) for _, images, mean, right in bins) / count,
        bins=bins,
        classes=sorted(classes, key=lambda row: (row[2] / row[1], -row[1], row[0])),
        confused=[(*pairs[i], counts[i]) for i in order],
        pairs=len(pairs),
        surest=[(i, labels[i], best[i], sure[i]) for i in sorted(np.flatnonzero(wrong), key=lambda i: -sure[i])[:12]],
    )


def share(right, count):
    """(right, percent, the two ends of Wilson's interval in percent)."""
    p = right / count
    middle, half = p + Z**2 / (2 * count), Z * np.sqrt(p * (1 - p) / count + Z**2 / (4 * count**2))
    return right, 100 * p, 100 * (middle - half) / (1 + Z**2 / count), 100 * (middle + half) / (1 + Z**2 / count)


def assert_is_summary(summary, rows):
    wanted = anew(rows)
    close = {"rel": 1e-9, "abs": 1e-9}  # Both are float64, in another order.
    for name in ("images", "top1", "top5", "loss", "calibration_error", "pairs"):
        assert getattr(summary, name) == pytest.approx(getattr(wanted, name), **close), name
    assert summary.confused == wanted.confused
    for found, (number, *figures) in zip(summary.bins, wanted.bins, strict=True):
        assert found == pytest.approx((number / 15, (number + 1) / 15, *figures), **close)
    for found, (*figures, often) in zip(summary.classes, wanted.classes, strict=True):
        assert found[:3] == tuple(figures) and found.taken_for in often
    for found, mistake in zip(summary.surest, wanted.surest, strict=True):
        assert found == pytest.approx(mistake, **close)


@pytest.mark.parametrize("seed", range(3))
def test_every_figure_of_a_summary_computed_anew(seed):
    rows = random_rows(seed)
    assert_is_summary(summarise(rows), rows)


def test_a_summary_where_all_is_right_names_no_mistakes():
    summary = summarise(Predictions(np.arange(3), np.eye(3)))
    assert summary.top1.percent == 100 and not summary.surest and not summary.confused
    assert all(row.taken_for is None for row in summary.classes)


class Report(NamedTuple):
    """A page, the predictions that were kept beside it, and what was evaluated."""

    text: str
    rows: dict
    model: Model
    source: object


@pytest.fixture(scope="module", params=["small", pytest.param("real", marks=pytest.mark.real_data)])
def report(request, tmp_path_factory):
    """The Report of a small random model, and that of the real weights."""
    folder = tmp_path_factory.mktemp("report")
    if request.param == "small":
        weights, data = request.getfixturevalue("ten_classes")
    else:
        shared = request.getfixturevalue("shared")
        weights, data = shared / "weights/shufflenet_v2_x1_0_mmpretrain.pth", shared / "imagenet-original"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHUFFLENET_JAX_CACHE", str(folder / "cache"))
        kept = ["--report", str(folder / "r.html"), "--predictions", str(folder / "p.npz")]
        assert evaluate.main(["--checkpoint", str(weights), "--data", str(data), *kept]) == 0
        model = Model(*load_model(weights))
    source = open_source(str(data), classes=model.info.classes)
    return Report((folder / "r.html").read_text(), read_predictions(folder / "p.npz"), model, source)


def cells_of(text, name):
    """The cells of each line of a table's body, by its id."""
    body = re.search(rf'<tbody id="{name}">(.*?)</tbody>', text, re.S)[1]
    return [
        [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", line)]
        for line in re.findall(r"<tr>.*?</tr>", body)
    ]


def figures_in(text):
    """(picture, its alt, the marked one, predicted, probability, label, name) of each mistake."""
    pattern = (
        r'<figure><img src="(.*?)" alt="(.*?)"> <img src="(.*?)"[^>]*>\s*'
        r"<figcaption><b>(.*?)</b>, (.*?); labelled <b>(.*?)</b><br>(.*?)</figcaption>"
    )
    return [tuple(map(html.unescape, found)) for found in re.findall(pattern, text)]


def test_every_figure_on_the_page_is_that_of_the_kept_predictions(report):
    text, rows, named = report.text, report.rows, report.model.class_name
    wanted = anew(rows)
    cards = {key: told for key, *told in re.findall(r'<strong id="(.*?)">(.*?)</strong>\s*<span>(.*?)</span>', text)}
    for key, (right, percent, low, high) in (("top-1", wanted.top1), ("top-5", wanted.top5)):
        interval = f"95 % interval {low:.2f} to {high:.2f} %"
        assert cards[key] == [f"{percent:.2f} %", f"{right} of {wanted.images} right; {interval}"]
    loss, low, high = wanted.loss
    assert cards["loss"] == [f"{loss:.4f}", f"mean over the images, in nats; 95 % interval {low:.4f} to {high:.4f}"]
    assert cards["ece"][0] == f"{wanted.calibration_error:.2f} %" and "over 15 bins" in cards["ece"][1]
    means = precision_recall_fscore_support(rows.label, rows.logits.argmax(1), average="macro", zero_division=0)
    balanced = np.mean([100 * right / images for _, images, right, _ in wanted.classes])
    precision, _, f1 = (100 * value for value in means[:3])
    told = f"mean of the classes' recall; macro precision {precision:.2f} %, F1 {f1:.2f} %"
    assert cards["balanced"] == [f"{balanced:.2f} %", told]
    assert len(cards) == 5

    bars = re.findall(r'<rect x="(.*?)" width="(.*?)" y="(.*?)" height="(.*?)".*?><title>(.*?)</title></rect>', text)
    lines = cells_of(text, "bins")
    filled = [found for found in wanted.bins if found[1]]
    for (*place, title), line, (number, images, mean, right) in zip(bars, lines, filled, strict=True):
        # The axes go from (36, 206) to (336, 6); between two bars there is a gap of 2.
        box = (36 + 20 * number + 1, 20 - 2, 206 - 200 * right, 200 * right)
        assert tuple(map(float, place)) == pytest.approx(box, abs=1e-9)
        assert title == f"{images} images, confidence {100 * mean:.1f} %, right {100 * right:.1f} %"
        within = f"{100 * number / 15:.0f} to {100 * (number + 1) / 15:.0f} %"
        assert line == [within, str(images), f"{100 * mean:.2f} %", f"{100 * right:.2f} %"]

    for line, (label, images, right, often) in zip(cells_of(text, "classes"), wanted.classes, strict=True):
        assert line[:4] == [named(label), str(images), str(right), f"{100 * right / images:.1f} %"]
        assert line[6] in {"" if found is None else named(found) for found in often}
        taken = rows.logits.argmax(1) == label
        precision, f1 = 100 * right / max(taken.sum(), 1), 200 * right / (taken.sum() + images)
        assert line[4:6] == [f"{precision:.1f} %", f"{f1:.1f} %"]
    assert f"<summary>{len(wanted.classes)} classes, the worst first</summary>" in text
    assert cells_of(text, "confused") == [[named(a), named(b), str(count)] for a, b, count in wanted.confused]
    assert (f"<caption>20 of {wanted.pairs} pairs.</caption>" in text) == (wanted.pairs > 20)
    assert [found[1:2] + found[3:] for found in figures_in(text)] == [
        (rows.name[place], named(predicted), f"{100 * sure:.1f} %", named(label), rows.name[place])
        for place, label, predicted, sure in wanted.surest
    ]


def test_the_page_says_how_images_are_prepared(report):
    told = (
        "Images are decoded with EXIF's rotation applied; short side to 256 pixels by Pillow's antialiased bilinear; "
        "the central 224 x 224; RGB, minus (123.675, 116.28, 103.53), over (58.395, 57.12, 57.375)."
    )
    assert f"<p>{told}</p>" in html.unescape(report.text)
    assert in_words(MEGVII_EVAL) == (
        "decoded with EXIF's rotation ignored; short side to 256 pixels by OpenCV's bilinear; the central 224 x 224; "
        "BGR, minus (0, 0, 0), over (1, 1, 1)"
    )
    assert in_words(TORCHVISION_EVAL_LARGE) == (
        "decoded with EXIF's rotation ignored; short side to 232 pixels by Pillow's antialiased bilinear; the central "
        "224 x 224; RGB times 0.00392157, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)"
    )


def from_url(url):
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))) as picture:
        return np.asarray(picture, np.float64)


def as_jpeg(pixels):
    """What the page's JPEGs leave of pixels."""
    file = io.BytesIO()
    Image.fromarray(np.uint8(pixels)).save(file, "JPEG", quality=80)
    return np.asarray(Image.open(file), np.float64)


def test_pictures_show_the_image_and_where_the_class_that_it_is_taken_for_is_seen(report):
    model, mistakes = report.model, zip(figures_in(report.text), anew(report.rows).surest, strict=True)
    for (plain, _, marked, *_), (place, label, predicted, _) in mistakes:
        crop = model.preprocess(report.source[place].image)
        conv5 = np.asarray(model.extract_feat(crop)["conv5"])[0]
        image = np.asarray(Image.fromarray(crop[0]).resize((168, 168), Image.Resampling.LANCZOS))
        # Of 255 steps; rounding may move a few pixels by one, while the map of the label is 1 to 22 away.
        assert np.abs(from_url(plain) - as_jpeg(image)).mean() < 0.1
        off = []
        for number in (predicted, label):
            seen = Image.fromarray(np.uint8(255 * model.class_activation_map(conv5, number)))
            seen = np.asarray(seen.resize((168, 168), Image.Resampling.BICUBIC)) / 255
            alpha = 0.15 + 0.5 * seen[..., None]
            mixed = image * (1 - alpha) + 255 * colormaps["inferno"](seen)[..., :3] * alpha
            off.append(np.abs(from_url(marked) - as_jpeg(mixed)).mean())
        assert off[0] < 0.1 and off[1] > 0.5


def test_a_report_is_one_page_without_outside_resources(report, ten_classes, refused):
    assert not re.search(r"(src|href)=\"(?!data:)", report.text) and "@import" not in report.text
    assert report.text.count("data:image/jpeg") == 2 * report.text.count("<figure>")
    assert "shufflenet-jax eval --checkpoint" in report.text
    model, data = ten_classes
    where = model / "model.json/r.html"
    assert "cannot be written" in refused(evaluate.main, "--checkpoint", model, "--data", data, "--report", where)


def test_a_single_image_that_is_right_makes_a_page_too(ten_classes):
    model = Model(*load_model(ten_classes[0]))
    rows = Predictions(np.array([2]), np.eye(10)[[2]], np.array(["0.png"]))
    source = open_source(str(ten_classes[1]), classes=model.info.classes)
    text = make_report(rows, model, source, title="one", command="")
    loss = -log_softmax(np.eye(10)[2])[2]
    assert re.search(rf'id="loss">{loss:.4f}</strong>\s*<span>mean over the images, in nats</span>', text)
    assert "mistakes" not in re.sub(r"<style>.*</style>", "", text, flags=re.S) and "confused" not in text


@pytest.mark.parametrize(
    ("data", "split", "title"),
    [
        ("tfds:imagenet_v2/matched-frequency", None, "model on tfds:imagenet_v2/matched-frequency"),
        ("tfds:imagenet2012", "train", "model on tfds:imagenet2012, split train"),
        (".", None, "model on photos"),
        ("..", None, "model on all"),
        ("../photos/", "val", "model on photos, split val"),
        ("/", None, "model on /"),
        ("digits", "test", "model on digits, split test"),
    ],
)
def test_titles_name_the_data_in_full(data, split, title, tmp_path, monkeypatch):
    (tmp_path / "all/photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "all/photos")
    words = ["--checkpoint", "runs/model/", "--data", data, *(["--split", split] if split else [])]
    assert evaluate.title_of(evaluate.parse(words)) == title


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_and_is_readable_in_a_browser_by_eye_and_by_keyboard(report, tmp_path, width, dark):
    (tmp_path / "page.html").write_text(report.text.replace("</body>", CHECKS + "</body>"))
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
    assert found["lines"]["bars"] and not found["lines"]["faint"] and found["lines"]["margin"] >= 2, found
    # Three tables scroll, and the confusion matrix of few classes; two parts unfold.
    assert found["stops"] == 5 + ('id="confusion"' in report.text) and not found["unseen"], found
    assert (found["ground"] == "rgb(255, 255, 255)") != dark


@pytest.mark.real_data
@pytest.mark.parametrize("report", ["real"], indirect=True)
def test_the_page_of_the_real_weights_has_their_known_figures(report):
    assert "161 of 201 right" in report.text and "189 of 201 right" in report.text
    assert 'id="loss">0.8554<' in report.text and report.text.count("data:image/jpeg") == 24
