import dataclasses
import hashlib
import json
import logging
import shutil
import socket
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, lively_network
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageDraw
from serving import serving
from small_training import few_units

import shufflenet_jax as snet
from shufflenet_jax import published
from shufflenet_jax.commands import from_torch, predict
from shufflenet_jax.config import MEGVII_EVAL
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.errors import InputError
from shufflenet_jax.files import hash_of
from shufflenet_jax.loading import adapt_channels

CARD = "shufflenet-v2-1x_16xb64_in1k"


def drawn(width=320, height=240):
    """A picture of a sort of bird."""
    image = Image.new("RGB", (width, height), (120, 170, 220))
    pen = ImageDraw.Draw(image)
    pen.ellipse((width * 0.2, height * 0.3, width * 0.7, height * 0.8), fill=(150, 90, 40))
    pen.ellipse((width * 0.6, height * 0.2, width * 0.8, height * 0.45), fill=(170, 100, 50))
    beak = [(width * x, height * y) for x, y in ((0.79, 0.3), (0.9, 0.34), (0.79, 0.38))]
    pen.polygon(beak, fill="gold")
    return image


def softmax(logits):
    scores = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    return scores / scores.sum(-1, keepdims=True)


# Downloads


CONTENT = bytes(range(256)) * 400
ENTRY = published.Published(
    *(0.5, "torchvision", 0.0, 0.0),
    *("net-file.pth", hashlib.sha256(CONTENT).hexdigest()[:10]),
    *("http://127.0.0.1:9/", "torchvision", "MIT"),
)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """(address, paths asked for) of a server with the file of the model "small"; the cache is empty."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served/net-file.pth").write_bytes(CONTENT)
    monkeypatch.setitem(published.PUBLISHED, "small", ENTRY)
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "served") as (address, asked):
        monkeypatch.setenv("SHUFFLENET_JAX_MIRROR", address)
        yield address, asked


def left_in(cache):
    return [path.name for path in (cache / "downloads").iterdir() if not path.name.endswith(".lock")]


def failure(name="small"):
    """The one line in which fetching a file fails."""
    with pytest.raises(InputError) as caught:
        published.file_of(name)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_published_file_is_downloaded_once_and_checked(mirror, tmp_path, caplog, capfd):
    address, asked = mirror
    caplog.set_level(logging.INFO, "shufflenet_jax")
    path = published.file_of("small")
    assert path.read_bytes() == CONTENT and path == tmp_path / "cache/downloads/net-file.pth"
    assert caplog.messages == [f"downloading {address}/net-file.pth"]
    assert not any(capfd.readouterr()), "the library prints nothing itself"
    assert published.file_of("small") == path and asked == ["/net-file.pth"]
    assert left_in(tmp_path / "cache") == ["net-file.pth"]


def test_without_a_mirror_the_authors_place_is_asked(mirror, monkeypatch):
    address, asked = mirror
    monkeypatch.setitem(published.PUBLISHED, "small", ENTRY._replace(place=f"{address}/"))
    monkeypatch.setenv("SHUFFLENET_JAX_MIRROR", "")
    assert published.file_of("small").read_bytes() == CONTENT
    assert asked == ["/net-file.pth"]


@pytest.mark.parametrize("trouble", ["another file", "cut", "404", "no server", "no address", "no http"])
def test_a_failed_download_names_the_address_and_the_place_and_leaves_nothing(trouble, mirror, tmp_path, monkeypatch):
    address, _ = mirror
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        free = listening.getsockname()[1]  # Bound, but nobody listens.
        places = {
            "another file": address,
            "cut": f"{address}/cut/",
            "404": f"{address}/elsewhere",
            "no server": f"http://127.0.0.1:{free}",
            "no address": "mirror/files",
            "no http": "http://127.0.0.1:80 80/",
        }
        if trouble == "another file":
            (tmp_path / "served/net-file.pth").write_bytes(CONTENT[::-1])
        monkeypatch.setenv("SHUFFLENET_JAX_MIRROR", places[trouble])
        told = failure()
    reasons = {"another file": "another file", "cut": "cut off", "404": "404", "no server": "refused"}
    assert told.startswith(f"{places[trouble].rstrip('/')}/net-file.pth ") and reasons.get(trouble, "") in told
    assert f"put it at {tmp_path / 'cache/downloads/net-file.pth'}" in told and "SHUFFLENET_JAX_MIRROR" in told
    assert left_in(tmp_path / "cache") == []
    assert socket.getdefaulttimeout() is None


def test_a_file_put_there_by_hand_is_taken_and_megvii_has_no_other_way(mirror, tmp_path, monkeypatch):
    _, asked = mirror
    monkeypatch.delenv("SHUFFLENET_JAX_MIRROR")
    place = tmp_path / "cache/downloads/ShuffleNetV2.0.5x.pth.tar"
    assert f"put it at {place}" in failure("megvii-0.5x") and not asked
    place.parent.mkdir(parents=True)
    place.write_bytes(b"by hand")
    assert published.file_of("megvii-0.5x") == place


def test_another_file_put_there_by_hand_is_refused(mirror, tmp_path):
    place = tmp_path / "cache/downloads/net-file.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT[1:])
    assert f"{place} is another file" in failure()
    place.write_bytes(CONTENT)
    assert published.file_of("small") == place


def test_a_server_that_sends_too_much_is_given_up(mirror, tmp_path):
    _, asked = mirror
    with open(tmp_path / "served/net-file.pth", "wb") as file:
        file.truncate(published.LARGEST_DOWNLOAD + 1)
    assert "more than 100,000,000 bytes" in failure() and asked
    assert left_in(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_named(mirror, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert f"the cache {tmp_path / 'cache/downloads'} cannot be written" in failure()


def test_two_processes_at_once_download_once(mirror):
    _, asked = mirror
    code = f"from shufflenet_jax.published import *; PUBLISHED['small'] = Published(*{tuple(ENTRY)}); file_of('small')"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert asked == ["/net-file.pth"] and sorted(map(len, said))[0] == 0
    assert published.file_of("small").read_bytes() == CONTENT


# The published model of the card


@pytest.fixture(scope="module")
def card_cache(shared, tmp_path_factory):
    """Where the real file of the card's model is downloaded to, from a server of this machine, when it is asked for."""
    root = tmp_path_factory.mktemp("card")
    (root / "served").mkdir()
    source = shared / "weights/shufflenet_v2_x1_0_mmpretrain.pth"
    entry = published.find(CARD)
    shutil.copy(source, root / "served" / entry.file)
    with pytest.MonkeyPatch.context() as patch, serving(root / "served") as (address, asked):
        patch.setitem(published.PUBLISHED, CARD, entry._replace(sha256=hash_of(source)[:8]))
        patch.setenv("SHUFFLENET_JAX_MIRROR", address)
        yield root / "cache", asked


@pytest.fixture
def card(card_cache, monkeypatch):
    """The paths that the server of the card's model was asked for."""
    cache, asked = card_cache
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(cache))
    return asked


@pytest.fixture(scope="module")
def card_model(card_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHUFFLENET_JAX_CACHE", str(card_cache[0]))
        return snet.get_model(CARD, pretrained=True)


SNIPPETS = """
from shufflenet_jax import get_model, inference_model
predict = inference_model('shufflenet-v2-1x_16xb64_in1k', 'demo/bird.JPEG')
print(predict['pred_class'])
print(predict['pred_score'])

model = get_model('shufflenet-v2-1x_16xb64_in1k', pretrained=True)
inputs = np.random.rand(1, 224, 224, 3).astype(np.float32)
out = model(inputs)
print(type(out))
feats = model.extract_feat(inputs)
print(type(feats))
"""


@pytest.mark.real_data
def test_the_snippets_of_the_card_run_as_they_stand(card, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = {"np": np}
    exec(SNIPPETS, names)
    pred_class, pred_score, array, mapping = capsys.readouterr().out.splitlines()
    assert pred_class == "flamingo" and 0.5 < float(pred_score) <= 1
    assert "Array" in array and "dict" in mapping
    shapes = {name: values.shape[1:] for name, values in names["feats"].items()}
    stages = {"stage2": (28, 28, 116), "stage3": (14, 14, 232), "stage4": (7, 7, 464)}
    assert shapes == {"stem": (56, 56, 24), **stages, "conv5": (7, 7, 1024), "pooled": (1024,)}
    assert names["out"].shape == (1, 1000) and len(card) == 1


@pytest.mark.real_data
def test_classes_and_scores_are_those_of_mmpretrain_on_real_images(card_model, shared):
    reference = np.load(shared / "imagenet-original/mmpretrain_reference.npz")
    places = {path.name: path for path in (shared / "imagenet-original/val").rglob("*.JPEG")}
    names = [str(places[name]) for name in reference["name"]]
    expected = softmax(reference["logits"])
    found = list(predict.predictions(card_model, names))
    assert [row[0] for row in found] == names and len(names) == 201
    logits = np.stack([row[2] for row in found])
    assert_array_equal(logits.argmax(1), reference["logits"].argmax(1))
    assert_allclose(softmax(logits), expected, atol=1e-4)

    # One by one, among them the image that EXIF turns and the grey ones, whose like may go another way.
    odd = [i for i, name in enumerate(names) if is_odd(name)]
    assert len(odd) == 4
    for i in sorted({*odd, *range(0, 200, 25)}):
        result = snet.inference_model(card_model, names[i])
        assert result["pred_label"] == expected[i].argmax() and result["pred_scores"].shape == (1000,)
        assert result["pred_class"] == list(imagenet_classes().values())[result["pred_label"]]
        assert_allclose(result["pred_scores"], expected[i], atol=1e-4)
        assert result["pred_score"] == pytest.approx(expected[i].max(), abs=1e-4)


def is_odd(path):
    with Image.open(path) as image:
        return image.mode == "L" or image.getexif().get(0x0112, 1) != 1


@pytest.mark.real_data
def test_predict_takes_the_cards_model_by_default(card, tmp_path, call):
    drawn().save(tmp_path / "bird.png")
    status, out, stderr = call(predict.main, tmp_path / "bird.png", "--json")
    assert (status, stderr) == (0, "")
    assert json.loads(out)["pred_class"] in imagenet_classes().values() and len(card) == 1


# Models in memory


IMAGES = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)


@pytest.fixture
def fresh():
    """Makes models by name, with fresh weights of 4 units instead of 16, which compile in a quarter of the time."""
    with few_units():
        yield partial(snet.get_model, "shufflenet_v2_x0_5", seed=3)


@pytest.fixture(scope="module")
def ten(ten_classes):
    return snet.get_model(ten_classes[0])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A model directory of a network that ends with stage4."""
    root = tmp_path_factory.mktemp("backbone")
    torch.save(lively_network("megvii-stages", num_classes=0, conv5=False).state_dict(), root / "b.pth")
    assert from_torch.main([str(root / "b.pth"), "--out", str(root / "b"), "--no-verify"]) == 0
    return root / "b"


def assert_same(ours, theirs):
    jax.tree.map(assert_array_equal, ours, theirs)


def test_a_name_gives_fresh_weights_that_go_by_the_seed(fresh):
    model = fresh()
    logits = model(IMAGES)
    assert logits.shape == (1, 1000) and np.isfinite(logits).all() and np.ptp(logits) > 0
    assert_same(fresh().variables, model.variables)
    kernels = [part.variables["params"]["conv1"]["conv"]["kernel"] for part in (model, fresh(seed=4))]
    assert not np.array_equal(*kernels)


def test_another_number_of_classes_remakes_the_classifier_alone(fresh):
    model, other = fresh(num_classes=10), fresh()
    assert model.info.num_classes == model.module.num_classes == 10 and model.info.classes is None
    assert model(IMAGES).shape == (1, 10)
    head = model.variables["params"].pop("fc")
    assert head["kernel"].shape == (1024, 10) and head["kernel"].std() == pytest.approx(0.01, rel=0.1)
    assert_same(fresh(num_classes=10).variables["params"].pop("fc"), head)
    del other.variables["params"]["fc"]
    assert_same(model.variables, other.variables)


def test_a_checkpoint_keeps_its_weights_under_a_new_classifier(ten, ten_classes):
    model = snet.get_model(ten_classes[0], num_classes=3, seed=5, dropout=0.2)
    assert model.class_name(2) == "2" and ten.class_name(2) == "kind2" and model.module.dropout == 0.2
    assert_same({**model.variables["params"], "fc": None}, {**ten.variables["params"], "fc": None})
    assert_same(model.variables["batch_stats"], ten.variables["batch_stats"])
    headless = snet.get_model(ten_classes[0], num_classes=0)
    assert "fc" not in headless.variables["params"] and "fc" in ten.variables["params"]
    assert_array_equal(headless.extract_feat(IMAGES)["pooled"], ten.extract_feat(IMAGES)["pooled"])
    with pytest.raises(InputError, match="no classifier"):
        headless(IMAGES)


def test_a_grey_network_sums_the_weights_of_the_colours(ten, ten_classes, tmp_path):
    grey = snet.get_model(ten_classes[0], in_chans=1)
    kernel = ten.variables["params"]["conv1"]["conv"]["kernel"]
    assert_allclose(grey.variables["params"]["conv1"]["conv"]["kernel"], kernel.sum(2, keepdims=True))
    inputs = np.random.default_rng(1).normal(size=(1, 224, 224, 1)).astype(np.float32)
    # The sums of three products come in another order.
    assert_allclose(grey(inputs), ten(inputs.repeat(3, -1)), rtol=1e-4, atol=1e-4)
    image = drawn()
    image.save(tmp_path / "colour.png")
    pixels = np.asarray(image.convert("L"))
    expected = grey.preprocess(pixels)
    assert expected.shape == (1, 224, 224, 1) and expected.dtype == np.uint8
    for same in (tmp_path / "colour.png", np.asarray(image), pixels[..., None], pixels[:, ::-1][:, ::-1]):
        assert_array_equal(grey.preprocess(same), expected)
    assert_array_equal(ten.preprocess(pixels[..., None]), expected.repeat(3, -1))


@pytest.mark.parametrize("mode", ["P", "YCbCr", "CMYK", "LA"])
def test_pillow_images_get_the_class_of_their_file(mode, ten, tmp_path):
    image = drawn().convert(mode)
    image.save(tmp_path / "bird.tif")
    scores, expected = (snet.inference_model(ten, same)["pred_scores"] for same in (image, tmp_path / "bird.tif"))
    assert_array_equal(scores, expected)


@pytest.mark.parametrize("in_chans", [2, 4, 7])
def test_other_channels_repeat_the_weights_of_the_colours_and_divide_them(in_chans, ten, ten_classes):
    model = snet.get_model(ten_classes[0], in_chans=in_chans)
    kernel, colours = (m.variables["params"]["conv1"]["conv"]["kernel"] for m in (model, ten))
    for i in range(in_chans):
        assert_allclose(kernel[:, :, i], colours[:, :, i % 3] * 3 / in_chans, rtol=1e-6)
    assert model.info.preprocess.mean == tuple(ten.info.preprocess.mean[i % 3] for i in range(in_chans))
    assert model(np.zeros((1, 64, 64, in_chans), np.uint8)).shape == (1, 10)
    module, variables = snet.load(ten_classes[0], in_chans=in_chans, num_classes=0)
    assert module == model.module.clone(num_classes=0) and "fc" not in variables["params"]
    assert f"(B, H, W, {in_chans})" in one_line(model, IMAGES)
    assert f"the network takes {in_chans} channels" in one_line(model.preprocess, np.asarray(drawn()))


def test_equal_channels_give_a_network_of_any_number_of_them_the_same_logits(ten, ten_classes):
    inputs = np.random.default_rng(1).normal(size=(1, 64, 64, 1)).astype(np.float32)
    six, back = (snet.get_model(ten_classes[0], in_chans=n) for n in (6, 3))
    assert back.variables is not six.variables and back.info == ten.info
    # The sums of six products come in another order than those of three.
    assert_allclose(six(inputs.repeat(6, -1)), ten(inputs.repeat(3, -1)), rtol=1e-4, atol=1e-4)


def test_blue_first_becomes_red_first_where_channels_are_repeated():
    kernel = np.arange(3.0, dtype=np.float32).reshape(1, 1, 3, 1)
    variables = {"params": {"conv1": {"conv": {"kernel": kernel}}}}
    preprocess = dataclasses.replace(MEGVII_EVAL, mean=(1.0, 2.0, 3.0))
    adapted, taken = adapt_channels(variables, preprocess, 4)
    assert_array_equal(adapted["params"]["conv1"]["conv"]["kernel"].ravel(), np.float32([2, 1, 0, 2]) * 3 / 4)
    assert (taken.mean, taken.channel_order) == ((3.0, 2.0, 1.0, 3.0), "any")
    again, preprocess = adapt_channels(adapted, taken, 1)
    assert_allclose(again["params"]["conv1"]["conv"]["kernel"].ravel(), [15 / 4])
    assert (preprocess.mean, preprocess.channel_order) == ((9 / 4,), "L")


def test_images_are_prepared_from_paths_bytes_and_arrays_alike(ten, tmp_path):
    image = drawn()
    image.save(tmp_path / "bird.png")
    expected = ten.preprocess(np.asarray(image))
    assert expected.shape == (1, 224, 224, 3)
    for same in (tmp_path / "bird.png", str(tmp_path / "bird.png"), (tmp_path / "bird.png").read_bytes(), image):
        assert_array_equal(ten.preprocess(same), expected)


def test_pixels_and_normalised_floats_give_the_same(ten):
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    floats = (IMAGES - mean) / std
    assert_allclose(ten(floats), ten(IMAGES), rtol=1e-4, atol=1e-4)  # Rounding, amplified by random weights.
    assert_array_equal(ten(floats.astype(np.float64)), ten(floats))
    assert_array_equal(ten(jax.numpy.asarray(IMAGES)), ten(IMAGES))


def test_a_backbone_has_features_alone(backbone):
    model = snet.get_model(backbone)
    features = model.extract_feat(IMAGES)
    assert features["stage4"].shape == (1, 7, 7, 192) and "pooled" not in features
    with pytest.raises(InputError, match="no classifier"):
        model(IMAGES)
    with pytest.raises(InputError, match="no classifier fits"):
        snet.get_model(backbone, num_classes=10)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"num_classes": 0}, {"fc"}),
        ({"num_classes": 7}, set()),
        ({"num_classes": 10}, set()),
        ({"in_chans": 1}, set()),
        ({"in_chans": 1, "num_classes": 7, "seed": 3, "dropout": 0.2}, set()),
        ({"num_classes": 0, "in_chans": 1, "lowering": "reference"}, {"fc"}),
        ({"num_classes": 0, "conv5": False}, {"fc", "conv5"}),
        ({"num_classes": 0, "conv5": False, "in_chans": 1}, {"fc", "conv5"}),
    ],
)
def test_a_changed_network_keeps_the_weights_that_fit_it(settings, missing, ten, ten_classes):
    module, variables = snet.load(ten_classes[0], **settings)
    images = np.float32(IMAGES)[:, :64, :64, : module.in_chans]
    # The reference lowering is the quickest to trace.
    logits, features = jax.eval_shape(module.clone(lowering="reference").apply, variables, images)
    classes = settings.get("num_classes", 10)
    assert (logits.shape == (1, classes)) if classes else logits is None
    assert ("pooled" in features) == ("conv5" not in missing) and module.num_classes == classes
    params, stored = variables["params"], ten.variables["params"]
    assert stored.keys() - params.keys() == missing and not params.keys() - stored.keys()
    changed = {"conv1"} if "in_chans" in settings else set()
    changed |= {"fc"} if classes != 10 else set()
    for layer in params.keys() - changed:
        assert_same(params[layer], stored[layer])
    assert variables["batch_stats"].keys() == ten.variables["batch_stats"].keys() - missing


def test_a_network_without_conv5_describes_itself(fresh):
    model = fresh(num_classes=0, conv5=False)
    info, features = model.info, model.extract_feat(IMAGES)
    assert (info.num_classes, info.conv5, info.classes, model.module.conv5) == (0, False, None, False)
    assert "stage4" in features and "conv5" not in features
    assert_same(model.variables["params"]["conv1"], fresh().variables["params"]["conv1"])


def one_line(function, *arguments, **settings):
    with pytest.raises(InputError) as caught:
        function(*arguments, **settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_is_no_model_is_refused_in_one_line(ten_classes, backbone, tmp_path):
    cases = [
        (("shufflenet_v2_x9_9",), {"pretrained": True}, "none is published under this name"),
        (("shufflenet_v2_x9_9",), {}, "shufflenet_v2_x0_5"),
        ((tmp_path,), {}, "no model at"),
        ((ten_classes[0],), {"in_chans": 0}, "in_chans is 0, but must be 1 or more"),
        ((ten_classes[0],), {"in_chans": -3}, "must be 1 or more"),
        ((ten_classes[0],), {"num_classes": -1}, "num_classes is -1"),
        ((ten_classes[0],), {"conv5": False}, "set num_classes to 0"),
        ((ten_classes[0],), {"conv5": False, "num_classes": 7}, "set num_classes to 0"),
        ((backbone,), {"conv5": True}, "leave conv5 out"),
    ]
    for arguments, settings, told in cases:
        assert told in one_line(snet.get_model, *arguments, **settings)
    assert "set num_classes to 0" in one_line(snet.load, ten_classes[0], conv5=False)
    assert "no model at" in one_line(snet.load, tmp_path)


def test_what_is_no_image_is_refused_in_one_line(ten, tmp_path):
    (tmp_path / "text.jpg").write_text("text")
    for image, told in {
        tmp_path / "none.jpg": "No such file",
        tmp_path / "text.jpg": "text.jpg is damaged",
        tmp_path: "Is a directory",
        "~nobody-of-this-name/a.jpg": "cannot be read",
        "a\0b.jpg": "cannot be read",
        b"bytes": "is damaged",
        b"\xff\xd8\xff": "is damaged",
    }.items():
        assert told in one_line(ten.preprocess, image)
    pixels = np.zeros((4, 4, 4), np.uint8)
    for array in (pixels, pixels[..., :3] / 255, pixels[:0, :, :3], None, [[1], [2, 3]]):
        assert "give a path" in one_line(ten.preprocess, array)
    assert "array has 500 x 4 pixels" in one_line(ten.preprocess, np.zeros((4, 500), np.uint8))
    shapes = [(224, 224, 3), (2, 3, 64, 64), (2, 64, 64, 1), (2, 0, 64, 3)]
    for batch in (*map(np.zeros, shapes), IMAGES.astype(np.int32), np.array(["bird.jpg"]), np.array(None)):
        assert "(B, H, W, 3)" in one_line(ten, batch)
    assert ten(IMAGES[:0]).shape == (0, 10)


def test_the_package_names_what_it_offers(ten_classes):
    assert set(snet.__all__) <= set(dir(snet)) and all(getattr(snet, name) for name in snet.__all__)
    module, variables = snet.load(ten_classes[0], lowering="reference")
    logits, _ = jax.eval_shape(module.apply, variables, np.float32(IMAGES))
    assert isinstance(module, snet.ShuffleNetV2) and logits.shape == (1, 10)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = snet.nonsense
