"""Images as people give them in Python: paths, addresses, Pillow images, arrays, and lists of these in any mixture."""

import io
import logging
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from serving import serving

import shufflenet_jax as snet
from shufflenet_jax import images, published
from shufflenet_jax.commands import predict
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.errors import InputError

TINY = {"channels": (8, 16, 16, 16, 32), "repeats": (2, 1, 1)}


def picture(seed=0, size=(300, 260)):
    """A smooth RGB image."""
    colors = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned():
    """EXIF that turns an image by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


SIXTEEN = Image.fromarray(np.asarray(picture(7).convert("L")).astype(np.uint16) * 257)
FILES = {  # What the decoder converts, each in its own way.
    "turned.jpg": encoded(picture(1), "JPEG", exif=turned()),
    "cmyk.tif": encoded(picture(2).convert("CMYK"), "TIFF"),
    "palette.png": encoded(picture(3).convert("P"), "PNG", transparency=bytes(range(256))),
    "alpha.png": encoded(picture(4).convert("RGBA"), "PNG"),
    "grey_alpha.png": encoded(picture(5).convert("LA"), "PNG"),
    "bits.png": encoded(picture(6).convert("1"), "PNG"),
    "sixteen.png": encoded(SIXTEEN, "PNG"),
    "moving.gif": encoded(picture(8), "GIF", save_all=True, append_images=[picture(9)]),
}


@pytest.fixture(scope="module")
def model():
    """A small network with random weights, whose images are prepared as MMPretrain does."""
    return snet.get_model(published.CARD, seed=1, **TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of FILES and of files that are not images."""
    root = tmp_path_factory.mktemp("images")
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    (root / "page.html").write_text("<html>There is no such picture.</html>")
    (root / "empty.jpg").touch()
    return root


@pytest.fixture
def address(folder):
    with serving(folder) as (address, _):
        yield address


def one_line(function, *arguments, **settings):
    """The message of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def softmax(logits):
    scores = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    return scores / scores.sum(-1, keepdims=True)


# What is an image


@pytest.mark.parametrize("name", FILES)
def test_each_way_to_give_an_image_prepares_the_same_pixels(name, model, folder, address):
    expected = model.preprocess(folder / name)
    assert expected.shape == (1, 224, 224, 3) and expected.dtype == np.uint8
    with Image.open(io.BytesIO(FILES[name])) as opened:
        ways = [str(folder / name), FILES[name], opened, f"{address}/{name}", f"{address.upper()}/{name}"]
        assert_array_equal(model.preprocess(ways), expected.repeat(len(ways), axis=0))


def test_lists_mix_paths_addresses_pillow_images_and_arrays(model, folder, address):
    pixels = np.asarray(picture())
    given = [
        *(folder / "turned.jpg", f"{address}/alpha.png", FILES["cmyk.tif"], picture(), picture().convert("L")),
        *(pixels, jnp.asarray(pixels), pixels[..., :1], pixels[..., 0]),
    ]
    expected = np.concatenate([model.preprocess(image) for image in given])
    assert_array_equal(model.preprocess(given), expected)
    assert_array_equal(model.preprocess(tuple(given)), expected)
    assert_array_equal(expected[3], expected[5])
    assert_array_equal(expected[7], expected[8])
    assert model.preprocess([]).shape == (0, 224, 224, 3) and snet.inference_model(model, []) == []


def test_a_batch_of_pixels_is_a_list_of_images(model):
    batch = np.stack([picture(seed) for seed in range(3)])
    assert_array_equal(model.preprocess(batch), model.preprocess(list(batch)))
    assert_array_equal(model.preprocess(jnp.asarray(batch)), model.preprocess(list(batch)))


def test_the_model_prepares_what_is_not_ready(model, folder):
    names = [folder / name for name in FILES]
    crops = model.preprocess(names)
    logits = model(crops)
    assert logits.shape == (len(FILES), 1000) and np.ptp(logits, axis=0).max() > 0
    assert_array_equal(model(names), logits)
    assert_array_equal(model.extract_feat(names)["stage3"], model.extract_feat(crops)["stage3"])
    assert_array_equal(model(names[0]), model(crops[:1]))
    pixels = np.asarray(picture())
    assert_array_equal(model(pixels), model(model.preprocess(pixels)))


def test_batches_and_floats_are_taken_as_they_are(model, caplog):
    crops = model.preprocess([picture(), picture(1)])
    floats = model.normalize(crops)
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    # One rounding of each operation.
    assert_allclose(floats, (crops.astype(np.float32) - mean) / std, rtol=1e-6, atol=1e-6)
    # Rounding of the normalized pixels, through the whole network.
    assert_allclose(model(floats), model(crops), rtol=1e-4, atol=1e-5)
    assert jax.eval_shape(model, crops).shape == (2, 1000)
    assert not caplog.messages


def test_an_array_that_looks_prepared_is_prepared_with_a_warning(model, caplog):
    (crop,) = model.preprocess(picture())
    caplog.set_level(logging.WARNING, "shufflenet_jax")
    assert_array_equal(model([crop]), model(model.preprocess(crop)))
    (message,) = caplog.messages
    assert message.startswith("an array of 224 x 224 pixels is scaled and cropped") and "(B, H, W, C)" in message


# What is not


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/none.jpg", "cannot be fetched: HTTP Error 404"),
        ("/page.html", "is damaged or not an image"),
        ("/empty.jpg", "is damaged or not an image"),
        ("/cut/turned.jpg", "cut off"),
        (":80 80/a.jpg", "cannot be fetched"),
    ],
)
def test_an_address_without_an_image_is_named_in_one_line(place, reason, model, address):
    message = one_line(model.preprocess, [picture(), address + place])
    assert message.startswith(f"image {address}{place} ") and reason in message
    assert one_line(snet.inference_model, model, address + place) == message


def test_an_address_that_sends_too_much_is_refused(model, address, folder, monkeypatch):
    monkeypatch.setattr(published, "LARGEST_DOWNLOAD", 1000)
    assert "it has more than 1,000 bytes" in one_line(model, f"{address}/turned.jpg")


@pytest.mark.parametrize("listening", [True, False])
def test_a_server_that_is_silent_or_not_there_is_given_up(listening, model, monkeypatch):
    monkeypatch.setattr(images, "SILENT_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        message = one_line(model, f"http://127.0.0.1:{server.getsockname()[1]}/a.jpg")
    assert message.startswith("image http://127.0.0.1:") and ("timed out" if listening else "refused") in message
    assert message.endswith("check the address")


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(model, address, monkeypatch):
    monkeypatch.setattr(images, "SILENT_SECONDS", 0.2)
    assert "cannot be fetched: it is too slow: " in one_line(model, f"{address}/slow/a.jpg")


PIXELS = np.zeros((8, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "images[1] is object of shape ()"),
        ([1, 2], "images[1] is int64 of shape (2,)"),
        ([[1], [2, 3]], "images[1] is not an array of numbers"),
        (PIXELS[None], "images[1] is uint8 of shape (1, 8, 9, 3)"),
        (PIXELS[..., :2], "images[1] is uint8 of shape (8, 9, 2)"),
        (PIXELS.astype(np.int32), "images[1] is int32"),
        (PIXELS / 255, "floats that are normalized already go to the model itself"),
        (b"rubbish", "image images[1] is damaged"),
        (Path("none.jpg"), "image none.jpg cannot be read: No such file"),
        ("", "cannot be read: Is a directory"),
        ("gs://bucket/a.jpg", "gs://bucket/a.jpg is an address"),
        (np.zeros((4, 500), np.uint8), "image images[1] has 500 x 4 pixels"),
    ],
)
def test_what_is_not_an_image_is_named_by_its_place(image, reason, model):
    message = one_line(model.preprocess, [PIXELS, image])
    assert reason in message
    assert one_line(snet.inference_model, model, [PIXELS, image]) == one_line(model, [PIXELS, image]) == message


def test_what_no_network_takes_is_refused(model):
    for batch in (np.zeros((2, 3, 64, 64)), np.zeros((2, 64, 64, 1), np.uint8), np.zeros((64, 64, 3)), PIXELS * 1.0):
        assert "(B, H, W, 3), uint8 or floats" in one_line(model, batch)
    assert "images[0] is float64" in one_line(snet.inference_model, model, PIXELS[None] * 1.0)


# Predictions


def test_lists_are_predicted_as_the_command_predicts_them(model, folder):
    names = [str(folder / name) for name in FILES] * 3
    results = snet.inference_model(model, names, top_k=4)
    expected = list(predict.predictions(model, names))
    assert len(results) == len(names) == 24
    for result, (name, _, logits, _) in zip(results, expected, strict=True):
        assert_allclose(result["pred_scores"], softmax(logits), rtol=1e-5)  # float32, and float64.
        row = predict.prediction_of(model, name, logits, 4)
        assert [entry["label"] for entry in result["topk"]] == [entry["label"] for entry in row["topk"]]
        assert [entry["class"] for entry in result["topk"]] == [entry["class"] for entry in row["topk"]]
        assert result["pred_label"] == row["pred_label"] == int(logits.argmax())


def test_the_best_classes_are_listed_in_their_order(model):
    result = snet.inference_model(model, picture(), top_k=3)
    assert set(result) == {"pred_label", "pred_class", "pred_score", "pred_scores", "topk"}
    order = np.argsort(-result["pred_scores"])[:3]
    names = list(imagenet_classes().values())
    expected = [{"label": i, "class": names[i], "score": float(result["pred_scores"][i])} for i in order.tolist()]
    assert result["topk"] == expected and result["pred_class"] == names[order[0]]
    (alone,) = snet.inference_model(model, [picture()])
    assert set(alone) == {"pred_label", "pred_class", "pred_score", "pred_scores"}
    assert_array_equal(alone["pred_scores"], result["pred_scores"])
    assert len(snet.inference_model(model, picture(), top_k=5000)["topk"]) == 1000
    assert len(snet.inference_model(model, np.stack([PIXELS, PIXELS]))) == 2
    for wrong in (0, -1, 1.5, True):
        assert "top_k is" in one_line(snet.inference_model, model, picture(), top_k=wrong)


# Names


def test_models_are_listed_by_a_pattern():
    assert snet.list_models("*x1*") == ["shufflenet_v2_x1_0", "shufflenet_v2_x1_5"]
    assert snet.list_models() == list(published.PUBLISHED) and snet.list_models("resnet*") == []
    (figures,) = snet.list_models("*x0_5", details=True)
    assert (figures["name"], figures["top1"], figures["parameters"]) == ("shufflenet_v2_x0_5", 60.552, 1366792)
    assert figures["url"].endswith("/shufflenetv2_x0.5-f707e7126e.pth") and figures["width"] == 0.5


# Saving


def test_a_saved_model_reads_back_with_the_same_logits(model, tmp_path, call):
    own = snet.get_model(published.CARD, seed=2, num_classes=3, in_chans=1, dropout=0.2, **TINY)
    own.save(tmp_path / "own")
    back = snet.get_model(tmp_path / "own")
    assert (back.info.num_classes, back.info.in_chans, back.module.dropout) == (3, 1, 0.2)
    assert back.info.preprocess == own.info.preprocess and back.info.table == own.info.table
    jax.tree.map(assert_array_equal, back.variables, own.variables)
    assert_array_equal(back(picture()), own(picture()))
    picture().save(tmp_path / "a.png")
    status, out, _ = call(predict.main, tmp_path / "a.png", "--checkpoint", tmp_path / "own", "--topk", 3)
    assert status == 0 and len(out.splitlines()) == 4

    assert "exists already" in one_line(own.save, tmp_path / "own")
    model.save(tmp_path / "own", overwrite=True)
    assert_array_equal(snet.get_model(tmp_path / "own")(picture()), model(picture()))
    (tmp_path / "file").touch()
    assert "cannot be written" in one_line(model.save, tmp_path / "file/model")


def test_the_features_that_a_classifier_reads_are_counted(model):
    assert model.num_features == model.variables["params"]["fc"]["kernel"].shape[0] == 32
    assert snet.get_model(published.CARD, num_classes=0, conv5=False, **TINY).num_features == 16
