import dataclasses
import gc
import io
import zipfile

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from shufflenet_jax.config import (
    DIGITS_EVAL,
    MEGVII_EVAL,
    MMPRETRAIN_EVAL,
    TORCHVISION_EVAL,
    TORCHVISION_EVAL_LARGE,
    TrainConfig,
)
from shufflenet_jax.data import decoding, geometry, normalization, pipeline
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.data.pipeline import Balanced, eval_batches, shuffled, train_batches
from shufflenet_jax.data.sources import Example, Source, open_source
from shufflenet_jax.errors import InputError

ROTATE = 0x0112  # EXIF's orientation; 6 is a quarter turn clockwise.


def picture(height, width, seed=0):
    """A smooth uint8 RGB picture that JPEG keeps well."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def folder(root, files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture(8, 8, seed=len(name)), "JPEG"))
    return root


# Sources


def test_there_are_1000_classes_in_the_order_of_their_wnids():
    classes = imagenet_classes()
    assert len(classes) == 1000 and list(classes) == sorted(classes) and classes["n01440764"] == "tench"


def test_digits_are_split_once_and_for_all():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test), train.num_classes) == (1438, 359, 10)
    names = [{source[i].name for i in range(len(source))} for source in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 1797
    assert len(open_source("digits")) == 359


def test_class_folders_are_ranked_by_the_checkpoints_classes_or_else_by_name(tmp_path):
    root = folder(tmp_path, ["val/n02/b.png", "val/n02/a.JPEG", "val/n01/sub/c.jpg", "val/n02/notes.txt"])
    source = open_source(root)
    assert [source[i][::2] for i in range(len(source))] == [("n01/sub/c.jpg", 0), ("n02/a.JPEG", 1), ("n02/b.png", 1)]
    assert source.classes == ("n01", "n02")
    wide = open_source(root, classes=["n00", "n01", "n02"], num_classes=3)
    assert [wide[i].label for i in range(3)] == [1, 2, 2] and wide.num_classes == 3


def test_lists_give_names_and_labels(tmp_path):
    root = folder(tmp_path, ["val/a b.jpg", "val/c.jpg"])
    (root / "meta").mkdir()
    (root / "meta/val.txt").write_text("c.jpg 7\n\na b.jpg 0\n")
    source = open_source(root, num_classes=1000)
    assert [source[i][::2] for i in range(2)] == [("c.jpg", 7), ("a b.jpg", 0)]


@pytest.mark.parametrize(
    ("files", "split", "listing", "told"),
    [
        ([], None, None, "none of the splits"),
        (["val/x/a.jpg"], "test", None, "no split 'test'"),
        (["val/x/a.txt"], None, None, "holds no images"),
        (["val/a.jpg"], None, "a.jpg\n", "line 1"),
        (["val/a.jpg"], None, "a.jpg 0\nb.jpg -1\n", "line 2"),
        (["val/a.jpg"], None, "\n", "lists no images"),
        (["val/a.jpg"], None, "a.jpg 9\n", "10 classes, but the model has 5"),
        (["val/x/a.jpg"], None, None, "1 classes, but the model has 5"),
    ],
)
def test_unusable_folders_are_refused_by_what_is_wrong_with_them(tmp_path, files, split, listing, told):
    folder(tmp_path, files)
    if listing is not None:
        (tmp_path / "meta").mkdir()
        (tmp_path / "meta/val.txt").write_text(listing)
    with pytest.raises(InputError, match=told):
        open_source(tmp_path, split, num_classes=5)


def test_folders_that_are_no_class_of_the_model_are_named(tmp_path):
    root = folder(tmp_path, [f"val/{name}/a.jpg" for name in "vwxyz"])
    with pytest.raises(InputError, match="w, x, y and 1 more"):
        open_source(root, classes=["v", "u"], num_classes=2)


def test_a_listed_file_that_is_missing_is_named(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/val.txt").write_text("gone.jpg 0\n")
    source = open_source(tmp_path)
    with pytest.raises(InputError, match=r"gone\.jpg cannot be read"):
        source[0]


# Transforms


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (256, 300), (40, 30), (1, 9)])
def test_mmpretrain_preprocessing_is_opencv_decoding_and_pillow_resizing(height, width):
    data = encode(picture(height, width), "JPEG", quality=90)
    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB)
    scale = 256 / min(height, width)
    size = [256 if side == min(height, width) else int(256 * side / min(height, width)) for side in (width, height)]
    assert max(size) == int(scale * max(height, width) + 1e-6)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    top, left = (round((side - 224) / 2) for side in resized.shape[:2])
    expected = resized[top : top + 224, left : left + 224]
    assert_array_equal(geometry.prepare(data, MMPRETRAIN_EVAL), expected)


def test_only_opencv_decoding_turns_an_image_as_its_exif_says():
    exif = Image.Exif()
    exif[ROTATE] = 6
    data = encode(picture(300, 400), "JPEG", exif=exif)
    assert decoding.decode(data, "cv2").shape == (400, 300, 3)
    assert decoding.decode(data, "pillow").shape == (300, 400, 3)


@pytest.mark.parametrize("decoder", ["cv2", "pillow"])
def test_grey_and_palette_and_transparent_images_become_three_channels(decoder):
    grey = picture(20, 30)[..., 0]
    for data in (encode(grey, "JPEG"), encode(grey)):
        pixels = decoding.decode(data, decoder)
        assert pixels.shape == (20, 30, 3) and (pixels == pixels[..., :1]).all()
    assert_array_equal(decoding.decode(encode(grey), decoder)[..., 0], grey)
    rgba = np.dstack([picture(20, 30), grey])
    assert decoding.decode(encode(rgba), decoder).shape == (20, 30, 3)


@pytest.mark.parametrize("decoder", ["cv2", "pillow"])
def test_16_bits_are_scaled_to_8(decoder):
    grey = np.random.default_rng(0).integers(0, 2**16, (20, 30), dtype=np.uint16)
    bitmap = b"P5 30 20 65535\n" + grey.astype(">u2").tobytes()
    for data in (encode(grey), encode(grey, "TIFF"), bitmap):
        assert_array_equal(decoding.decode(data, decoder), np.dstack([grey >> 8] * 3))
    colours = np.dstack([grey, grey[::-1], grey[:, ::-1]])
    data = cv2.imencode(".png", colours[..., ::-1])[1].tobytes()
    assert_array_equal(decoding.decode(data, decoder), colours >> 8)


@pytest.mark.parametrize(("decoder", "data"), [("cv2", b"\xff\xd8\xff"), ("pillow", b"\x89PNG\r\n\x1a\n")])
def test_files_that_end_in_their_first_bytes_are_named(decoder, data):
    with pytest.raises(InputError, match=r"some\.jpg is damaged"):
        decoding.decode(data, decoder, "some.jpg")


def test_wide_torchvision_weights_resize_to_232():
    data = encode(picture(464, 700))
    resized = Image.open(io.BytesIO(data)).resize((350, 232), Image.Resampling.BILINEAR)
    assert_array_equal(geometry.prepare(data, TORCHVISION_EVAL_LARGE), np.asarray(resized)[4:228, 63:287])
    assert geometry.prepare(data, TORCHVISION_EVAL).shape == (224, 224, 3)


def test_megvii_preprocessing_is_opencv_resizing_without_antialias_to_nearest_size():
    data = encode(picture(333, 500))
    resized = cv2.resize(np.asarray(Image.open(io.BytesIO(data))), (int(256 / 333 * 500 + 0.5), 256))
    left = round((resized.shape[1] - 224) / 2)
    assert_array_equal(geometry.prepare(data, MEGVII_EVAL), resized[16:240, left : left + 224])


def test_normalisation_orders_and_scales_the_channels_as_the_weights_expect():
    crops = picture(224, 224)[None]
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    expected = (crops - mean) / std
    # float32 rounds each operation at 6e-8; torchvision divides by 255 first.
    np.testing.assert_allclose(normalization.normalize(crops, MMPRETRAIN_EVAL), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(normalization.normalize(crops, TORCHVISION_EVAL), expected, rtol=1e-5, atol=2e-6)
    assert_array_equal(normalization.normalize(crops, MEGVII_EVAL), crops[..., ::-1])


def test_digits_are_enlarged_in_grey():
    image = open_source("digits")[0].image
    crop = geometry.prepare(image, DIGITS_EVAL)
    expected = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)
    assert_array_equal(crop[..., 0], expected)
    assert crop.shape == (32, 32, 1)


@pytest.mark.parametrize("decoder", ["cv2", "pillow"])
@pytest.mark.parametrize("damage", ["text", "empty", "half", "header", "png"])
def test_damaged_images_are_named(decoder, damage):
    # With a thumbnail in its EXIF block, a cut file still holds an end-of-image mark.
    exif = Image.Exif()
    exif[ROTATE] = 1
    thumbnail = encode(picture(16, 16), "JPEG")
    whole = encode(picture(100, 100), "JPEG", exif=exif, comment=thumbnail)
    if damage == "half":  # Fill bytes before a marker are allowed.
        head, marker, tail = whole.rpartition(b"\xff\xdb")
        filled = head + b"\xff\xff" + marker + tail
        assert_array_equal(decoding.decode(filled, decoder), decoding.decode(whole, decoder))
    data = {"text": b"not an image", "empty": b"", "half": whole[: len(whole) // 2], "header": whole[:4]}
    data["png"] = encode(picture(100, 100))[:-100]
    data = data[damage]
    assert decoding.decode(whole, decoder).shape == (100, 100, 3)
    with pytest.raises(InputError, match=r"some\.jpg is damaged"):
        decoding.decode(data, decoder, "some.jpg")


# Pipeline


def numbered(count):
    """Examples whose every pixel is their number."""
    return Source(count, lambda i: Example(f"#{i}", np.full((8, 8), i, np.uint8), i % 10), 10, None, tuple)


def test_evaluation_reads_every_example_once_in_order_and_masks_the_rest():
    batches = list(eval_batches(numbered(23), DIGITS_EVAL, batch_size=5))
    assert [len(batch["labels"]) for batch in batches] == [5] * 5
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    real = joined["mask"] > 0
    assert list(joined["names"][real]) == [f"#{i}" for i in range(23)]
    assert_array_equal(joined["images"][real][:, 0, 0, 0], np.arange(23))
    assert joined["mask"].sum() == 23 and not joined["images"][~real].any()
    assert len(list(eval_batches(numbered(23), DIGITS_EVAL, batch_size=5, limit=7))) == 2


def config(**changes):
    settings = {"image_size": 32, "preprocessing": "digits", "crop": "center", "flip": False, "batch_size": 10}
    return TrainConfig(data="digits", **{**settings, **changes})


def test_balanced_sampling_takes_as_many_of_each_class_in_an_order_of_its_own():
    labels = np.repeat([0, 1, 3], [50, 9, 31])
    read = lambda index: Example(str(index), b"", int(labels[index]))  # noqa: E731
    order = Balanced(Source(90, read, 4, None, labels.tolist), seed=3)
    passes = [[order.find(place, epoch) for place in range(90)] for epoch in range(2)]
    for taken in passes:
        assert np.bincount(labels[taken]).tolist() == [30, 30, 0, 30]
        times = np.bincount(taken, minlength=90)
        assert times[:50].max() == 1 and times[50:59].min() == 3 and times[59:].max() == 1  # Equally often, or once.
    assert passes[0] != passes[1] and passes[0] == [order.find(place, 0) for place in range(90)]
    runs = np.flatnonzero(np.diff(labels[passes[0]]) == 0)
    assert 15 < len(runs) < 45  # The classes alternate at random: a third of 89 on average.


def test_a_training_reads_a_balanced_pass():
    source = open_source("digits", "train")
    taken = [
        batch["labels"][batch.get("mask", np.ones(10)) > 0]
        for batch in train_batches(source, config(sampling="balanced", batch_size=10), stop_step=144)
    ]
    counts = np.bincount(np.concatenate(taken))
    assert counts.sum() == len(source) == 1438 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("backend", ["pillow", "cv2"])
@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (96, 128), (1000, 130), (97, 97)])
@pytest.mark.parametrize("size", [(96, 128), (128, 96), (160, 100)])
def test_a_rectangle_is_cut_from_an_image_that_just_covers_a_larger_one_of_its_shape(shape, size, backend):
    preprocess = dataclasses.replace(MMPRETRAIN_EVAL.with_side(size), backend=backend)
    resized = geometry.resize_to_cover(picture(*shape), preprocess)
    covered = [side * preprocess.resize / min(size) for side in size]
    assert all(length >= side for length, side in zip(resized.shape, covered, strict=False))
    assert min(length - side for length, side in zip(resized.shape, covered, strict=False)) < 1  # Just.
    scales = [after / before for after, before in zip(resized.shape, shape, strict=False)]
    assert max(scales) / min(scales) < 1 + 1 / min(shape) + 1 / min(resized.shape[:2])  # One scale, but for rounding.
    assert geometry.prepare(picture(*shape), preprocess).shape == (*size, 3)


def test_every_pass_over_the_training_data_takes_each_example_once_in_an_order_of_its_own():
    batches = train_batches(numbered(20), config(), stop_step=6)
    numbers = np.concatenate([batch["images"][:, 0, 0, 0] for batch in batches]).reshape(3, 20)
    assert all(sorted(row) == list(range(20)) for row in numbers)
    assert len({tuple(row) for row in numbers}) == 3
    again = train_batches(numbered(20), config(seed=1), stop_step=2)
    assert tuple(np.concatenate([batch["images"][:, 0, 0, 0] for batch in again])) != tuple(numbers[0])


def test_the_order_of_a_pass_is_as_random_as_a_permutation():
    size, batch, kinds = 20_000, 256, 10
    order = np.array([shuffled(place, size, seed=0, epoch=0) for place in range(size)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(size)  # Five standard errors.
    batches = (order * kinds // size)[: size // batch * batch].reshape(-1, batch)
    counts = np.array([np.bincount(row, minlength=kinds) for row in batches])
    # Chi-square of 9 degrees of freedom: mean 9, variance 18. Lower means more even batches than chance makes.
    chi = ((counts - batch / kinds) ** 2 / (batch / kinds)).sum(1)
    assert abs(chi.mean() - 9) < 4 * np.sqrt(18 / len(batches))


def test_repeated_augmentation_uses_each_image_several_times_in_a_row():
    (batch,) = train_batches(numbered(30), config(aug_repeats=3, batch_size=30), stop_step=1)
    numbers = batch["images"][:, 0, 0, 0].reshape(10, 3)
    assert (numbers == numbers[:, :1]).all() and len(set(numbers[:, 0])) == 10


LIVELY = {"crop": "random", "flip": True, "shift": 2, "random_erasing": 0.5, "batch_size": 40}


def joined(batches):
    batches = list(batches)
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_equal_batches(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, column in theirs.items():
        assert_array_equal(ours[key], column, err_msg=key)


@pytest.fixture(scope="module")
def first_thousand():
    """What a run of one process sees first of the digits: images with their crops, flips, erased parts."""
    return joined(train_batches(open_source("digits", "train"), config(**LIVELY), stop_step=25, threads=1))


@pytest.mark.parametrize("settings", [{"threads": 3}, {"workers": 1}, {"workers": 2, "threads": 1}])
def test_threads_and_workers_do_not_change_what_training_sees(settings, first_thousand):
    batches = train_batches(open_source("digits", "train"), config(**LIVELY), stop_step=25, **settings)
    assert_equal_batches(joined(batches), first_thousand)
    del batches
    gc.collect()  # As `train` does. Python 3.13.0 cannot release shared memory while the next workers start.


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_what_one_sees(hosts, first_thousand):
    source = open_source("digits", "train")
    parts = [train_batches(source, config(**LIVELY), stop_step=25, host=host, hosts=hosts) for host in range(hosts)]
    together = (
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*parts, strict=True)
    )
    assert_equal_batches(joined(together), first_thousand)


def test_training_can_start_at_any_step_with_what_an_uninterrupted_run_sees_there(first_thousand):
    batches = train_batches(open_source("digits", "train"), config(**LIVELY), start_step=7, stop_step=25)
    assert_equal_batches(joined(batches), {key: column[7 * 40 :] for key, column in first_thousand.items()})


def test_hosts_share_an_evaluation_row_by_row():
    parts = [eval_batches(numbered(23), DIGITS_EVAL, batch_size=6, host=host, hosts=2) for host in (0, 1)]
    names = [list(batch["names"]) for pair in zip(*parts, strict=True) for batch in pair]
    assert [name for part in names for name in part if name] == [f"#{i}" for i in range(23)]
    with pytest.raises(InputError, match="multiple of the 4 hosts"):
        eval_batches(numbered(23), DIGITS_EVAL, batch_size=6, hosts=4)


def test_a_damaged_training_image_is_named_and_replaced_without_changing_the_rest():
    sound = open_source("digits", "train")

    def read(index):
        example = sound[index]
        return example._replace(image=b"damaged") if index == 3 else example

    def run(source):
        return joined(train_batches(source, config(**LIVELY), stop_step=35))

    damaged, expected = run(dataclasses.replace(sound, read=read)), run(sound)
    (row,) = np.flatnonzero(damaged["damaged"] != "")
    assert sound[3].name in damaged["damaged"][row] and not any(expected["damaged"])
    assert_equal_batches(
        {key: np.delete(column, row, 0) for key, column in damaged.items()},
        {key: np.delete(column, row, 0) for key, column in expected.items()},
    )
    assert damaged["labels"][row] == sound[4].label
    assert not np.array_equal(damaged["images"][row], expected["images"][row])


@pytest.mark.parametrize(("room", "decoded"), [(12 * 8 * 8 * 3, 12), (12 * 8 * 8 * 3 - 1, 36)])
def test_images_that_fit_in_memory_together_are_decoded_once_and_change_nothing(monkeypatch, room, decoded):
    files = [encode(picture(8, 8, seed)) for seed in range(12)]
    source = Source(12, lambda i: Example(str(i), files[i], i), 12, None, tuple)
    expected = joined(train_batches(source, config(batch_size=4), stop_step=9))
    usual, calls = decoding.decode, []
    monkeypatch.setattr(decoding, "decode", lambda data, *given: calls.append(data) or usual(data, *given))
    monkeypatch.setattr(pipeline, "KEPT_BYTES", room)
    found = joined(train_batches(source, config(batch_size=4), stop_step=9, threads=1))
    assert len(calls) == decoded and set(calls) == set(files)
    assert_equal_batches(found, expected)


def test_data_in_which_nothing_can_be_read_is_refused():
    broken = Source(3, lambda index: Example(f"#{index}", b"", 0), 1, None, tuple)
    with pytest.raises(InputError, match="no image of the training data"):
        list(train_batches(broken, config(batch_size=2), stop_step=1))


def test_bad_input_keeps_its_type_and_words_across_decoding_threads(tmp_path):
    root = folder(tmp_path, [f"val/x/{i:02}.jpg" for i in range(20)])
    (root / "val/x/11.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"x/11\.jpg is damaged"):
        list(eval_batches(open_source(root), MMPRETRAIN_EVAL, batch_size=4))


@pytest.mark.parametrize("top", ["", "photos/"])
def test_zip_reads_as_the_folder_it_holds(tmp_path, top):
    rng = np.random.default_rng(0)
    for name in ("val/cat/b.png", "val/cat/a.webp", "val/dog/deep/c.bmp", "train/dog/d.jpg", "val/dog/notes.txt"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(path)
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for path in (tmp_path / "tree").rglob("*"):
            archive.write(path, top + path.relative_to(tmp_path / "tree").as_posix())

    folder, zipped = (open_source(str(tmp_path / name)) for name in ("tree", "tree.zip"))
    assert [zipped[i] for i in range(len(zipped))] == [folder[i] for i in range(len(folder))]
    assert (len(zipped), zipped.classes, list(zipped.labels())) == (3, ("cat", "dog"), [0, 0, 1])
    with pytest.raises(InputError, match="has no split 'test'"):
        open_source(str(tmp_path / "tree.zip"), "test")


def test_zip_with_lists_takes_the_labels_of_the_lists(tmp_path):
    pixels = io.BytesIO()
    Image.new("RGB", (5, 4)).save(pixels, "png")
    with zipfile.ZipFile(tmp_path / "listed.zip", "w") as archive:
        archive.writestr("top/meta/val.txt", "b.png 4\nmissing.png 1\n")
        archive.writestr("top/val/b.png", pixels.getvalue())
    source = open_source(str(tmp_path / "listed.zip"))
    assert (len(source), source.num_classes, source[0].label) == (2, 5, 4)
    with pytest.raises(InputError, match=r"val/missing\.png cannot be read"):
        source[1]
