"""The commands predict, models and publish."""

import io
import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import lively_network
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from serving import serving

import shufflenet_jax as snet
from shufflenet_jax.checkpoint import VARIABLES, TrainingCheckpoints, hash_of_variables
from shufflenet_jax.commands import from_torch, models, predict, publish
from shufflenet_jax.loading import load_model

RNG = np.random.default_rng(0)


def picture(width=60, height=48, mode="RGB"):
    """A smooth random picture."""
    small = RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a maker of cameras"
    return exif


def with_chunk(png, kind, content):
    """A PNG with one more chunk behind its header."""
    chunk = kind + content
    return png[:33] + struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def files():
    """{name: (content, what the error says or None)}: whatever may lie in a folder of images."""
    png, jpeg = encoded(picture(), "PNG"), encoded(picture(), "JPEG")
    big = encoded(picture(300, 200), "JPEG")
    odd_exif = bytearray(encoded(picture(), "JPEG", exif=exif_of(6)))
    entries = odd_exif.find(b"Exif\0\0") + 14
    odd_exif[entries : entries + 2] = b"\x00\xff"  # More entries than there are.
    sixteen = Image.fromarray(RNG.integers(0, 2**16, (40, 50), dtype=np.uint16))
    good = {
        "jpeg.jpg": jpeg,
        "upper.JPEG": jpeg,
        "alpha.png": encoded(picture(mode="RGBA"), "PNG"),
        "grey_alpha.png": encoded(picture(mode="LA"), "PNG"),
        "sixteen.png": encoded(sixteen, "PNG"),
        "palette.gif": encoded(picture(mode="P"), "GIF"),
        "moving.gif": encoded(picture(mode="P"), "GIF", save_all=True, append_images=[picture(mode="P")]),
        "palette.png": encoded(picture(mode="P"), "PNG", transparency=bytes(range(256))),
        "bits.png": encoded(picture(mode="1"), "PNG"),
        "cmyk.jpg": encoded(picture(mode="CMYK"), "JPEG"),
        "web.webp": encoded(picture(), "WEBP"),
        "grey.jpg": encoded(picture(mode="L"), "JPEG"),
        "turned.jpg": encoded(picture(), "JPEG", exif=exif_of(6)),
        "odd_exif.jpg": bytes(odd_exif),
        "odd_exif.webp": encoded(picture(), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12"),
        "odd_profile.png": with_chunk(png, b"iCCP", b"icc\0\0" + zlib.compress(b"rubbish" * 30)),
        "odd_gamma.png": with_chunk(with_chunk(png, b"gAMA", b"\0\0\0\1"), b"gAMA", b"\0\0\0\1"),
        "flawed.jpg": big[: len(big) // 2] + bytes(40) + big[len(big) // 2 + 40 :],
        "one_pixel.png": encoded(picture(1, 1), "PNG"),
        "bitmap.bmp": encoded(picture(), "BMP"),
        "tagged.tif": encoded(picture(), "TIFF"),
        "price $5 and $6.png": png,
        "鳥.png": png,
        "below/deeper/jpeg.jpg": jpeg,
    }
    bad = {
        "broad.jpg": (encoded(picture(10000, 50), "JPEG"), "too narrow"),
        "empty.jpg": (b"", "is damaged"),
        "text.jpg": (b"This is a text.\n", "is damaged"),
        "cut.jpg": (big[: len(big) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "is damaged"),
        "cut.gif": (good["palette.gif"][: len(good["palette.gif"]) // 2], "is damaged"),
        "cut.webp": (good["web.webp"][: len(good["web.webp"]) // 2], "is damaged"),
        "marker.jpg": (b"\xff\xd8\xff", "truncated"),
        "float.tif": (encoded(Image.fromarray(np.float32(picture(mode="L"))), "TIFF"), "has 32 bits a channel"),
        "bomb.png": (with_size(png, 12000, 9000), "is damaged"),
    }
    more = {f"more{i:02}.jpg": encoded(picture(), "JPEG") for i in range(100 - len(good) - len(bad))}
    return {name: (content, None) for name, content in (good | more).items()} | bad


def with_size(png, width, height):
    """A PNG that says it is of another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(folder, {path: what the error says or None}) of 100 files, good and bad, and one that is no image at all."""
    root = tmp_path_factory.mktemp("mixed") / "mixed"
    found = {}
    for name, (content, told) in files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        found[str(root / name)] = told
    (root / "notes.txt").write_text("not asked for")
    (root / "folder.jpg").mkdir()
    return root, found


@pytest.fixture(scope="module")
def model(ten_classes):
    return snet.get_model(ten_classes[0])


def assert_told(stderr, expected):
    """One `error:` line for each name, in any order, and not a word more but what is skipped."""
    lines = [line for line in stderr.splitlines() if not line.startswith("skipped: 1 file of ")]
    assert len(lines) == len(expected) and all(line.startswith("error: ") for line in lines), stderr
    for name, told in expected.items():
        assert any(re.search(rf" {re.escape(name)}[ :]", line) and told in line for line in lines), (name, told, lines)


def test_a_folder_of_mixed_files_gives_a_result_or_one_line_for_each(mixed, model, ten_classes, call):
    root, expected = mixed
    assert len(expected) == 100
    status, out, stderr = call(predict.main, root, "--checkpoint", ten_classes[0], "--json", "--topk", 3)
    assert status == 2
    assert_told(stderr, {name: told for name, told in expected.items() if told})
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == sorted((n for n, told in expected.items() if not told), key=Path)
    for row in rows:
        assert len(row["topk"]) == 3 and row["topk"][0] == {
            key: row[f"pred_{key}"] for key in ("label", "class", "score")
        }
        scores = [entry["score"] for entry in row["topk"]]
        assert scores == sorted(scores, reverse=True) and scores[-1] >= 0 and sum(scores) <= 1 + 1e-5
        assert row["pred_class"] == f"kind{row['pred_label']}"
    by_name = {os.path.basename(row["image"]): row for row in rows}
    for name in ("turned.jpg", "sixteen.png", "cmyk.jpg"):
        alone = snet.inference_model(model, root / name)
        assert by_name[name]["pred_label"] == alone["pred_label"]
        assert by_name[name]["pred_score"] == pytest.approx(alone["pred_score"], abs=1e-4)


def test_names_folders_addresses_and_stdin_go_together(mixed, ten_classes, tmp_path, monkeypatch, call):
    root, _ = mixed
    (tmp_path / "without images").mkdir()
    listed = (
        f"{root}/alpha.png\n\n  {root}/gone.jpg \n-\n~nobody-of-this-name/a.jpg\n".encode() + b"\xff.jpg\nnull\0.jpg\n"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    with serving(root) as (address, _):
        names = [f"{address}/jpeg.jpg", f"{address}/none.jpg", f"{address}/text.jpg", "HTTP://127.0.0.1:1/a.jpg"]
        words = [root / "grey.jpg", tmp_path / "without images", *names, f"{address}/a b.jpg", "-", root / "below"]
        status, out, stderr = call(predict.main, *words, "--checkpoint", ten_classes[0], "--topk", 99)
    assert status == 2
    told = {
        str(tmp_path / "without images"): "holds no images",
        names[1]: "HTTP Error 404",
        names[2]: "is damaged",
        names[3]: "refused",
        f"{address}/a b.jpg": "cannot be fetched",
        f"{root}/gone.jpg": "No such file",
        "~nobody-of-this-name/a.jpg": "cannot be read",
        r"\udcff.jpg": "No such file",
        "null\0.jpg": "cannot be read",
    }
    assert_told(stderr, told)
    blocks = out.splitlines()
    assert blocks[::11] == [f"{root}/grey.jpg", names[0], f"{root}/alpha.png", f"{root}/below/deeper/jpeg.jpg"]
    assert all(re.fullmatch(r" *\d+\.\d\d %  kind\d", line) for i, line in enumerate(blocks) if i % 11)


def test_good_images_alone_end_well(mixed, ten_classes, call, refused, monkeypatch):
    root, _ = mixed
    status, out, stderr = call(predict.main, root / "alpha.png", "--checkpoint", ten_classes[0])
    assert (status, stderr, len(out.splitlines())) == (0, "", 6)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "no names of images on stdin" in refused(predict.main, "-", "--checkpoint", ten_classes[0])


@pytest.mark.parametrize(("layer", "shape"), [("pooled", (1024,)), ("stage4", (7, 7, 192))])
def test_features_of_a_folder_are_written_in_order(layer, shape, mixed, model, ten_classes, tmp_path, call):
    root, expected = mixed
    argv = (root, "--checkpoint", ten_classes[0], "--features", tmp_path / "deep/f.npz", "--layer", layer)
    status, out, stderr = call(predict.main, *argv)
    assert (status, out) == (2, "")
    assert_told(stderr, {name: told for name, told in expected.items() if told})
    rows = np.load(tmp_path / "deep/f.npz")
    names = sorted((name for name, told in expected.items() if not told), key=Path)
    assert list(rows["name"]) == names and rows["features"].shape == (len(names), *shape)
    last = model.extract_feat(model.preprocess(names[-1]))[layer][0]
    # A batch of 16 sums in another order than one image.
    assert_allclose(rows["features"][-1], last, atol=1e-4 * np.abs(last).max())
    assert os.listdir(tmp_path / "deep") == ["f.npz"]


@pytest.mark.parametrize("cam", [(), ("--cam",)])
def test_pictures_show_the_images_with_their_classes(cam, mixed, ten_classes, tmp_path, call):
    root, _ = mixed
    names = ["alpha.png", "grey.jpg", "price $5 and $6.png", "鳥.png", "turned.jpg", "one_pixel.png", "text.jpg"]
    argv = ("--checkpoint", ten_classes[0], "--save-picture", tmp_path / "p.png", "--topk", 10, *cam)
    status, out, stderr = call(predict.main, *(root / name for name in names), *argv)
    assert status == 2 and len(out.splitlines()) == 66
    assert_told(stderr, {str(root / "text.jpg"): "is damaged"})
    with Image.open(tmp_path / "p.png") as drawn:
        assert drawn.format == "PNG" and 1000 < drawn.width < 2500 and 400 < drawn.height < 1500
        assert np.asarray(drawn.convert("L")).std() > 10
    assert os.listdir(tmp_path) == ["p.png"]


def test_a_folder_of_damaged_images_leaves_nothing(ten_classes, tmp_path, call):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"")
    for options in ((), ("--save-picture", tmp_path / "p.png", "--cam"), ("--features", tmp_path / "f.npz")):
        status, out, stderr = call(predict.main, tmp_path / "images", "--checkpoint", ten_classes[0], *options)
        assert (status, out) == (2, "")
        lines = stderr.splitlines()
        assert "a.jpg is damaged" in lines[0] and len(lines) == (2 if options else 1)
        assert not options or "nothing is left to write" in lines[1]
        assert os.listdir(tmp_path) == ["images"]


def test_what_cannot_be_done_is_refused_before_anything_is_computed(mixed, ten_classes, tmp_path, refused):
    image = mixed[0] / "alpha.png"
    (tmp_path / "file").touch()
    for argv, told in {
        ("--cam",): "--save-picture",
        ("--features", "f.npz", "--save-picture", "p.png"): "leave one of them out",
        ("--features", tmp_path / "file/f.npz"): "f.npz cannot be written",
        ("--save-picture", tmp_path / "file/p.png"): "p.png cannot be written",
        ("--save-picture", tmp_path): "is a folder",
        ("--topk", "0"): "--topk",
        ("--layer", "stage9"): "--layer",
    }.items():
        # Nor is the model looked for.
        assert told in refused(predict.main, image, "--checkpoint", tmp_path / "none", *argv), argv
    assert "no model at" in refused(predict.main, image, "--checkpoint", tmp_path / "none")
    assert "IMAGE" in refused(predict.main)
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_a_backbone_gives_the_features_it_has(mixed, tmp_path, call, refused):
    torch.save(lively_network("megvii-stages", num_classes=0, conv5=False).state_dict(), tmp_path / "b.pth")
    assert from_torch.main([str(tmp_path / "b.pth"), "--out", str(tmp_path / "b"), "--no-verify"]) == 0
    argv = (mixed[0] / "alpha.png", "--checkpoint", tmp_path / "b")
    assert "no classifier" in refused(predict.main, *argv)
    assert "ends with stage4" in refused(predict.main, *argv, "--features", tmp_path / "f.npz")
    assert not (tmp_path / "f.npz").exists()
    assert call(predict.main, *argv, "--features", tmp_path / "f.npz", "--layer", "stage4") == (0, "", "")
    assert np.load(tmp_path / "f.npz")["features"].shape == (1, 7, 7, 192)


# models


def test_models_are_listed_with_their_figures(call, monkeypatch):
    status, out, _ = call(models.main, "--json")
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert status == 0 and list(rows) == list(snet.list_models()) and len(rows) == 9
    # The parameters that torchvision and Megvii give.
    parameters = {"0_5": 1366792, "1_0": 2278604, "1_5": 3503624, "2_0": 7393996}
    assert {name: rows[f"shufflenet_v2_x{name}"]["parameters"] for name in parameters} == parameters
    card = rows["shufflenet-v2-1x_16xb64_in1k"]
    assert (card["top1"], card["top5"], card["parameters"], card["licence"]) == (69.55, 88.92, 2278604, "Apache-2.0")
    assert card["url"].startswith("https://download.openmmlab.com/") and card["url"].endswith("5bf4721e.pth")
    assert rows["megvii-1.0x"]["url"] is None

    few = snet.list_models()[:2]
    monkeypatch.setattr(models, "list_models", lambda: few)  # Each takes a while to count.
    heading, *lines = call(models.main)[1].splitlines()
    assert heading.split()[:3] == ["name", "width", "parameters"]
    for line, name in zip(lines, few, strict=True):
        assert line.startswith(f"{name} ") and f" {rows[name]['parameters']:,} " in line and len(line) <= 120
        assert line.endswith(rows[name]["licence"])


# publish


@pytest.fixture(scope="module")
def workdir(ten_classes, tmp_path_factory):
    """A training workdir whose best checkpoint is the first of two."""
    _, variables, info = load_model(ten_classes[0])
    workdir = tmp_path_factory.mktemp("trained")
    config = {"data": "/home/me/pets", "width": 0.5, "init_from": "/home/me/began.pth", "preprocessing": "mmpretrain"}
    described = json.loads(info.to_json()) | {"source": {"config": config}}
    (workdir / "model.json").write_text(json.dumps(described))
    worse = {**variables, "params": {**variables["params"], "fc": {"kernel": 0, "bias": 0}}}
    worse["params"]["fc"] = {key: np.zeros_like(value) for key, value in variables["params"]["fc"].items()}
    with TrainingCheckpoints(workdir) as checkpoints:
        checkpoints.save(1, {VARIABLES: variables}, {"top1": 60.0})
        checkpoints.save(2, {VARIABLES: worse}, {"top1": 50.0})
    return workdir


def test_a_published_model_has_its_hash_in_its_name_and_gives_the_same(model, ten_classes, tmp_path, call, refused):
    argv = (ten_classes[0], "--name", "net_10", "--out", tmp_path / "out", "--licence", "CC-BY-4.0")
    measured = ("--top1", 91.5, "--top5", 99, "--data", "ten kinds of noise")
    status, out, stderr = call(publish.main, *argv, *measured)
    path = tmp_path / "out" / os.path.basename(out.strip())
    assert (status, stderr) == (0, "") and out.strip() == str(path)
    given = snet.get_model(path)
    digest = hash_of_variables(given.variables)
    assert path.name == f"net_10-{digest[:8]}" and os.listdir(tmp_path / "out") == [path.name]
    assert sorted(os.listdir(path)) == ["README.md", "config.json", "model.safetensors"]
    images = RNG.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    assert_array_equal(given(images), model(images))

    card = (path / "README.md").read_text()
    for fact in (f"# {path.name}\n", "0.5x, torchvision", "| 10 |", "352,042", "CC-BY-4.0", "91.5 %", "99.0 %", digest):
        assert fact in card, fact
    assert "ten kinds of noise" in card and "source | net.pth" in card and f'get_model("{path.name}")' in card
    assert "exists already" in refused(publish.main, *argv)
    assert sorted(os.listdir(path)) == ["README.md", "config.json", "model.safetensors"]


def test_of_a_training_the_best_is_published_without_its_history_and_places(model, workdir, tmp_path, call):
    status, out, _ = call(publish.main, workdir, "--name", "pets", "--out", tmp_path, "--licence", "MIT")
    assert status == 0
    given = snet.get_model(out.strip())
    assert_array_equal(given.variables["params"]["fc"]["kernel"], model.variables["params"]["fc"]["kernel"])
    assert hash_of_variables(given.variables) == hash_of_variables(model.variables)
    assert given.info.source["config"] == {**given.info.source["config"], "data": "pets", "width": 0.5}
    written = "".join(path.read_text() for path in tmp_path.rglob("*.[jm][sd]*"))
    assert "pets" in written and "/home/me" not in written and "top-1" not in written
    assert "| began with | began.pth |" in written  # Whose licence decides about this one's.


def test_what_cannot_be_published_is_refused(ten_classes, tmp_path, refused):
    (tmp_path / "file").touch()

    def told(checkpoint=ten_classes[0], out=tmp_path / "out", name="net"):
        return refused(publish.main, checkpoint, "--out", out, "--name", name, "--licence", "MIT")

    for name in ("../net", ".net", "", "a b", "a\nb"):
        assert "--name" in told(name=name)
    assert "no model at" in told(checkpoint=tmp_path)
    assert "cannot be written" in told(out=tmp_path / "file/below")
    assert "--licence" in refused(publish.main, ten_classes[0], "--out", tmp_path, "--name", "net")
    assert os.listdir(tmp_path) == ["file"]
