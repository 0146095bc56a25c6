import io
import json

import numpy as np
import pytest
from PIL import Image

from shufflenet_jax.commands import verify


@pytest.fixture
def folder(tmp_path):
    """Class folders with one image of every unusual kind."""

    def save(name, mode="RGB", size=(40, 30), seed=0, **options):
        path = tmp_path / "data/val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path, **options)
        return path

    exif = Image.Exif()
    exif[0x0112] = 6
    save("cat/a.jpg", seed=1)
    save("cat/b.jpg", seed=2, size=(50, 60))
    save("cat/again.jpg", seed=1)
    save("dog/grey.jpg", "L")
    save("dog/cmyk.jpg", "CMYK")
    save("dog/turned.jpg", exif=exif)
    cut = save("dog/cut.jpg", seed=3)
    cut.write_bytes(cut.read_bytes()[:-100])
    return tmp_path / "data"


def test_verify_tells_what_is_unusual_and_exits_1_when_anything_cannot_be_read(folder, tmp_path, call):
    status, out, _ = call(verify.main, folder)
    assert status == 1
    assert json.loads(out.splitlines()[-1]) == {
        "images": 7, "unreadable": 1, "grey": 1, "cmyk": 1, "rotated": 1, "duplicates": 1, "classes": 2,
        "skipped": 0,
    }  # fmt: skip
    for told in (
        "cannot be read: 1: image dog/cut.jpg is damaged",
        "grey: 1: dog/grey.jpg",
        "CMYK: 1: dog/cmyk.jpg",
        "turned by EXIF: 1: dog/turned.jpg",
        "the same bytes: 1: cat/a.jpg = cat/again.jpg",
        "classes: 2 of 2 present, 3 to 3 images each",
        "sizes: 40 to 50 wide, 30 to 60 high",
    ):
        assert told in out
    (folder / "val/dog/cut.jpg").unlink()
    assert call(verify.main, folder)[0] == 0


def test_verify_draws_a_training_batch_with_its_labels(folder, tmp_path, call):
    status, out, _ = call(verify.main, folder, "--preview", tmp_path / "batch.png", "--image-size", 64)
    assert status == 1 and "preview:" in out
    with Image.open(io.BytesIO((tmp_path / "batch.png").read_bytes())) as picture:
        assert picture.size[0] > 1000
    argv = ("digits", "--config", "digits", "--preview", tmp_path / "digits.png")
    status, out, _ = call(verify.main, *argv)
    assert status == 0 and json.loads(out.splitlines()[-1])["images"] == 359
    assert (tmp_path / "digits.png").exists()


def test_verify_refuses_what_is_no_data(tmp_path, refused):
    assert "no data at" in refused(verify.main, tmp_path / "none")


@pytest.mark.real_data
def test_verify_finds_the_grey_and_the_rotated_image_among_real_ones(shared, call):
    status, out, _ = call(verify.main, shared / "imagenet-original")
    found = json.loads(out.splitlines()[-1])
    assert status == 0
    assert (found["images"], found["grey"], found["rotated"], found["classes"]) == (201, 3, 1, 201)
