import base64
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from html import unescape as html_text
from pathlib import Path

import numpy as np
import pytest
from page_checks import READABILITY
from PIL import Image
from serving import serving

from shufflenet_jax.checkpoint import module_of
from shufflenet_jax.commands import export
from shufflenet_jax.config import MEGVII_EVAL, TORCHVISION_EVAL, ModelInfo, Preprocess
from shufflenet_jax.errors import InputError
from shufflenet_jax.exports import browser, graph, web
from shufflenet_jax.exports.network import Signature
from shufflenet_jax.files import cache_dir
from shufflenet_jax.inference import Model
from shufflenet_jax.loading import load_model
from shufflenet_jax.model import init_variables
from shufflenet_jax.published import MIRROR

GREY = Preprocess("pillow", 40, "pillow", 32, "L", 1 / 255, mean=(0.3,), std=(0.4,))
PACKAGE = "ONNXRUNTIME_WEB"  # Names the package of onnxruntime-web; else the tests ask npm for it, once.
needs_browser = pytest.mark.skipif(not browser.find(), reason="no Chromium on this machine")


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The package of onnxruntime-web."""
    if os.environ.get(PACKAGE):
        return Path(os.environ[PACKAGE])
    if not shutil.which("npm"):
        pytest.skip(f"no npm on this machine, and {PACKAGE} names no package of onnxruntime-web")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shufflenet_jax-tests"
    path = folder / f"onnxruntime-web-{web.VERSION}.tgz"
    if not path.exists():
        aside = tmp_path_factory.mktemp("npm")
        words = ["npm", "pack", "--silent", f"onnxruntime-web@{web.VERSION}"]
        done = subprocess.run(words, cwd=aside, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"npm gives no onnxruntime-web: {done.stderr[-200:]}")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(next(aside.iterdir()), path)
    return path


@pytest.fixture
def small_runtime(tmp_path, monkeypatch):
    """A package of small files in the place of onnxruntime-web's, whose hashes the product knows."""
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(tmp_path / "cache"))
    contents = {"script": b"export default 1;</script>", "binary": b"\0asm" * 50}
    names = {part: name for part, (name, _) in web.FILES.items()}
    files = {part: (names[part], hashlib.sha256(content).hexdigest()) for part, content in contents.items()}
    monkeypatch.setattr(web, "FILES", files)
    folder = tmp_path / "dist"
    folder.mkdir()
    with tarfile.open(tmp_path / "runtime.tgz", "w:gz") as archive:
        for part, content in contents.items():
            (folder / names[part]).write_bytes(content)
            archive.add(folder / names[part], f"package/dist/{names[part]}")
    return tmp_path / "runtime.tgz", folder, contents


def test_the_runtime_comes_from_its_package_or_is_downloaded_once(small_runtime, monkeypatch):
    archive, folder, contents = small_runtime
    assert web.runtime_files(archive) == contents
    with serving(folder) as (address, asked):
        monkeypatch.setenv(MIRROR, address)
        assert web.runtime_files() == contents == web.runtime_files()
        assert len(asked) == 2
    assert web.runtime_files() == contents  # Without a server.


def test_another_runtime_is_refused_and_nothing_is_kept(small_runtime, tmp_path, monkeypatch):
    archive, folder, _ = small_runtime
    (tmp_path / "text.tgz").write_bytes(b"hello")
    (tmp_path / "cut.tgz").write_bytes(archive.read_bytes()[:-60])
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    for name in ("text", "cut", "empty", "none"):
        with pytest.raises(InputError, match=r"npm pack onnxruntime-web@"):
            web.runtime_files(tmp_path / f"{name}.tgz")
    script = web.FILES["script"][0]
    (folder / script).write_bytes(b"another")
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as package:
        for name, _ in web.FILES.values():
            package.add(folder / name, f"package/dist/{name}")
    with pytest.raises(InputError, match="another version"):
        web.runtime_files(tmp_path / "other.tgz")
    with serving(folder) as (address, _):
        monkeypatch.setenv(MIRROR, address)
        with pytest.raises(InputError, match="another file"):
            web.runtime_files()
    assert not list(cache_dir().rglob(script))


def test_the_page_is_a_folder_or_one_file_that_asks_for_nothing_else(ten_classes, small_runtime, tmp_path):
    model = Model(*load_model(ten_classes[0]))
    contents = {**small_runtime[2], "network": b"network"}
    for single in (False, True):
        html = web.page_of(model, Signature(), contents, single=single)
        web.write_page(tmp_path / f"page{single}", html, contents, single=single)
        settings = json.loads(re.search(r'id="settings">(.*?)</script>', html, re.S)[1])
        assert settings["classes"] == [f"kind{i}" for i in range(10)] and settings["preprocess"]["crop"] == 224
        assert not re.search(r"(src|href)=\"(?!data:)|https?:", html) and "connect-src 'self'" in html
        inlined = dict(re.findall(r'<script type="text/plain" id="(\w+)">(.*?)</script>', html))
        unpacked = {name: gzip.decompress(base64.b64decode(text)) for name, text in inlined.items()}
        assert unpacked == (contents if single else {})
    names = {path.name: path.read_bytes() for path in (tmp_path / "pageFalse").iterdir()}
    assert names.pop("index.html").startswith(b"<!doctype html>")
    assert names == {web.NAMES[part]: content for part, content in contents.items()}


def test_a_page_never_replaces_a_folder_with_other_files(ten_classes, small_runtime, tmp_path, refused):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/mine.txt").write_text("mine")
    words = (ten_classes[0], "--format", "web", "--runtime", small_runtime[0])
    assert "mine.txt" in refused(export.main, *words, "--out", tmp_path / "site")
    assert (tmp_path / "site/mine.txt").read_text() == "mine"
    assert "is a folder" in refused(export.main, *words, "--single-file", "--out", tmp_path / "site")
    assert "--single-file is for --format web" in refused(
        export.main, ten_classes[0], "--format", "onnx", "--single-file"
    )


def test_without_chromium_the_network_is_compared_alone_and_that_is_said(
    ten_classes, small_runtime, tmp_path, call, monkeypatch
):
    monkeypatch.setattr(browser, "find", lambda: None)
    words = (ten_classes[0], "--format", "web", "--runtime", small_runtime[0], "--out", tmp_path / "site")
    for _ in range(2):  # A page of ours gives way to a newer one.
        status, out, stderr = call(export.main, *words)
        assert status == 0 and "there is no Chromium" in stderr and "ONNX Runtime" in out, stderr
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"index.html", *web.NAMES.values()}


# In the browser

PICTURES = {  # As (width, height, settings of Pillow's save).
    "wide.jpg": (401, 300, {"quality": 90}),
    "tall.png": (97, 350, {}),
    "half.png": (512, 640, {}),
    "small.webp": (60, 90, {"lossless": True}),
    "turned.jpg": (320, 240, {"quality": 80, "exif": 6}),
    "grey.png": (300, 280, {"mode": "L"}),
    "exact.png": (256, 300, {}),
}


def picture(name):
    """The bytes of a picture with edges and gradients."""
    width, height, settings = PICTURES[name]
    settings = dict(settings)
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(coarse).copy()
    pixels[height // 3 : height // 2, ::5] = 255 - pixels[height // 3 : height // 2, ::5]
    image = Image.fromarray(pixels).convert(settings.pop("mode", "RGB"))
    if "exif" in settings:
        exif = Image.Exif()
        exif[0x0112] = settings.pop("exif")
        settings["exif"] = exif
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG"}.get(name[-3:], Path(name).suffix[1:]), **settings)
    return file.getvalue()


# Run inside the page, with a result as it would be: what sticks out, faint texts, what no key reaches.
CHECKS = (
    """
<script type="module">
window.shufflenet.ready.catch(() => {}).then(() => setTimeout(() => {
  document.getElementById("choose").disabled = false;
  document.querySelector("details").open = true;
  const item = document.createElement("li");
  item.innerHTML = '<h2>' + "long".repeat(40) + '</h2><ol><li><div class="row"><span>' + "class".repeat(30) +
    '</span><span>99.9 %</span></div><div class="track"><div style="width: 50%"></div></div></li></ol>' +
    '<p class="time">31 ms</p><p class="wrong">This is no picture</p>';
  document.getElementById("results").append(item);
"""
    + READABILITY
    + """  const texts = [...document.querySelectorAll("body :not(script):not(noscript)")].filter(written);
  const faint = texts.filter((e) => contrast(getComputedStyle(e).color, ground(e)) < 4.5).map((e) => e.outerHTML);
  const outside = (e) => e.getBoundingClientRect().right > innerWidth + 0.5;
  const wide = [...document.querySelectorAll("body *")].filter(outside);
  const outlined = [["#choose", "label"], ["summary", "summary"]].map(([stop, shown]) => {
    document.querySelector(stop).focus({focusVisible: true});
    const style = getComputedStyle(document.querySelector(shown));
    return style.outlineStyle === "solid" && contrast(style.outlineColor, ground(document.body)) >= 3;
  });
  const button = document.querySelector("label").getBoundingClientRect();
  parent.postMessage(JSON.stringify({ scroll: document.documentElement.scrollWidth, texts: texts.length, faint,
    wide: wide.map((e) => e.outerHTML.slice(0, 60)), outlined, button: button.height,
    ground: getComputedStyle(document.body).backgroundColor }), "*");
}));
</script>
"""
)
# A window is never narrower than 500 pixels; a frame may be.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<script>addEventListener("message", (event) => { document.documentElement.dataset.seen = event.data; });</script>
<iframe src="page.html" width="WIDTH" height="900" frameborder="0"></iframe>
"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_and_is_readable_by_eye_and_by_keyboard(ten_classes, small_runtime, tmp_path, width, dark):
    model = Model(*load_model(ten_classes[0]))
    contents = {**small_runtime[2], "network": b"none"}  # It cannot be loaded, which changes nothing of this.
    html = web.page_of(model, Signature(), contents, single=True)
    (tmp_path / "page.html").write_text(html.replace("</body>", CHECKS + "</body>"))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    words = [browser.find(), *browser.OPTIONS, "--no-sandbox", "--dump-dom", "--virtual-time-budget=20000"]
    words += ["--hide-scrollbars", "--window-size=1600,1000", f"--user-data-dir={tmp_path / 'user'}"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    seen = json.loads(html_text(re.search(r"data-seen=\"([^\"]*)\"", done.stdout)[1]))
    assert seen["scroll"] <= width and not seen["wide"] and not seen["faint"] and seen["texts"] > 10, seen
    assert seen["outlined"] == [True, True] and seen["button"] >= 44, seen  # A finger's width, in pixels.
    assert (seen["ground"] == "rgb(255, 255, 255)") != dark


@pytest.fixture(scope="module")
def page_parts(ten_classes, package):
    """The model, and the files of its page: the network is any."""
    model = Model(*load_model(ten_classes[0]))
    settings = {"batch": 1, "with_preprocessing": True}
    network, _ = graph.make_model(model.module, model.variables, model.info.preprocess, **settings)
    return model, {**web.runtime_files(package), "network": network.SerializeToString()}


@needs_browser
def test_the_page_prepares_pictures_to_the_pixel_as_we_do(page_parts, tmp_path):
    model, contents = page_parts
    rectangles = TORCHVISION_EVAL.with_side((160, 96)), MEGVII_EVAL.with_side((192, 256))
    for number, preprocess in enumerate((TORCHVISION_EVAL, MEGVII_EVAL, *rectangles, model.info.preprocess, GREY)):
        changed = Model(
            model.module,
            model.variables,
            dataclasses.replace(model.info, preprocess=preprocess, in_chans=preprocess.channels),
        )
        contents = {**contents, "network": network_for(preprocess)}  # The page only prepares.
        html = web.page_of(changed, Signature(), contents, single=False)
        web.write_page(tmp_path / str(number), html, contents, single=False)
        page = browser.Page(tmp_path / str(number))
        try:
            for name in PICTURES:
                content = picture(name)
                ours = changed.preprocess(content)
                theirs = page.prepared(content).reshape(ours.shape)
                difference = np.abs(theirs.astype(int) - ours).max()
                # The order of the two passes over tall pictures is Pillow's own affair.
                assert difference <= (name in ("tall.png",)), (preprocess, name, difference)
        finally:
            page.close()


def network_for(preprocess):
    """The graph of any network that takes images of this size."""
    module = module_of(ModelInfo(0.5, "torchvision", 10, preprocess, in_chans=preprocess.channels))
    variables = init_variables(module, seed=0)
    return graph.make_model(module, variables, preprocess, batch=1, with_preprocessing=True)[0].SerializeToString()


@needs_browser
def test_one_file_goes_through_the_command_and_is_compared_in_the_browser(ten_classes, package, tmp_path, call):
    model, data = ten_classes
    words = ("--format", "web", "--runtime", package, "--single-file", "--data", data, "--resolution", "64x96")
    status, out, stderr = call(export.main, model, *words, "--out", tmp_path / "page.html")
    assert status == 0, stderr
    assert re.search(r"^onnxruntime-web .* in Chromium .*, 12 images: largest difference", out, re.M)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
