"""Models on the Hugging Face Hub: what `publish` writes and pushes, and `hf-hub:OWNER/NAME` as a checkpoint."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from conftest import GREY, ROOT
from hub_server import COMMIT, TOKEN, files_in_commit, hub
from huggingface_hub import ModelCard
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import shufflenet_jax as snet
from shufflenet_jax.architecture import TABLES
from shufflenet_jax.checkpoint import hash_of_variables, module_of, save_model
from shufflenet_jax.commands import from_torch, info, publish
from shufflenet_jax.config import ModelInfo
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.errors import InputError
from shufflenet_jax.exports.card import Statements, card
from shufflenet_jax.exports.repository import config_of, save_repository
from shufflenet_jax.loading import load_model
from shufflenet_jax.model import variable_shapes
from shufflenet_jax.porting.dialects import DIALECTS

CONFIG = {"data": "/home/me/pets", "init_from": "hf-hub:me/began@v1", "width": 0.5}
INFO = dataclasses.replace(
    GREY,
    width=None,
    channels=(8, 16, 16, 16, 32),
    repeats=(2, 1, 1),
    classes=("ant", "bee", "Käfer"),
    source={"config": CONFIG},
)
# Runs lines of words as commands, one after another, as `NAME=VALUE info --checkpoint ...`.
LINES = """
import contextlib, io, json, os, sys
from shufflenet_jax.__main__ import main
from shufflenet_jax.checkpoint import hash_of_variables
from shufflenet_jax.commands.console import run
from shufflenet_jax.loading import load_model
results = {}
for line in json.load(sys.stdin):
    words = line.split()
    settings = dict(words.pop(0).split("=") for word in list(words) if "=" in word)
    stdout, stderr = io.StringIO(), io.StringIO()
    os.environ.update(settings)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        if words[0] == "load":
            module, variables, info = load_model(words[1])
            status = [repr(module), hash_of_variables(variables), info.to_json()]
        else:
            status = run(main, words)
    for name in settings:
        del os.environ[name]
    results[line] = status, stdout.getvalue(), stderr.getvalue()
print(json.dumps(results))
"""


def run_lines(lines, cwd, **environment):
    """{line: (status, stdout, stderr)} of lines in a new process."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(cwd / "hf"), **environment}
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", LINES], cwd=cwd, env=environment, input=json.dumps(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory of random variables."""
    folder = tmp_path_factory.mktemp("model") / "net"
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), variable_shapes(module_of(INFO)))
    save_model(folder, INFO, variables)
    return folder


@pytest.fixture(scope="module")
def repository(model, tmp_path_factory):
    """The folder that `publish` writes of it."""
    out = tmp_path_factory.mktemp("published")
    argv = (model, "--out", out, "--name", "pets", "--licence", "CC-BY-4.0", "--top1", 91.5, "--top5", 99)
    assert publish.main([*map(str, argv), "--data", "ten pets", "--datasets", "me/pets"]) == 0
    (folder,) = out.iterdir()
    return folder


# What is written


def test_the_folder_gives_the_same_logits_classes_and_preprocessing(model, repository):
    assert sorted(os.listdir(repository)) == ["README.md", "config.json", "model.safetensors"]
    before, again = snet.get_model(model), snet.get_model(repository)
    assert again.info.classes == INFO.classes and again.info.preprocess == INFO.preprocess
    assert again.info.source == {"config": {**CONFIG, "data": "pets"}}  # Not where it lay.
    assert again.info == dataclasses.replace(before.info, source=again.info.source)
    assert repository.name == f"pets-{hash_of_variables(before.variables)[:8]}"
    images = np.random.default_rng(0).integers(0, 256, (2, *INFO.preprocess.size, 1), dtype=np.uint8)
    assert_array_equal(again(images), before(images))
    assert load_model(repository / "model.safetensors")[2] == again.info  # The file alone is a checkpoint too.


def test_the_hub_reads_the_head_of_the_card(repository):
    shown = ModelCard.load(repository / "README.md")
    data = shown.data.to_dict()
    assert data == yaml.safe_load((repository / "README.md").read_text().split("---\n")[1])
    (entry,) = data.pop("model-index")
    assert data == {
        "license": "cc-by-4.0",
        "library_name": "shufflenet_jax",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "shufflenet_jax", "jax", "flax", "shufflenet_v2"],
        "datasets": ["me/pets"],
        "base_model": "me/began",
        "metrics": ["accuracy"],
    }
    assert entry["name"] == "pets"
    results = shown.data.eval_results  # As huggingface_hub understands them.
    assert [(r.metric_name, r.metric_value, r.dataset_type, r.dataset_name) for r in results] == [
        ("top-1 accuracy", 0.915, "me/pets", "ten pets"),
        ("top-5 accuracy", 0.99, "me/pets", "ten pets"),
    ]
    assert shown.text.startswith(f"\n# {repository.name}\n") and f'get_model("{repository.name}")' in shown.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"license": "other", "license_name": "my-own-terms-2"}),
        ({"num_classes": 0, "classes": None}, {"pipeline_tag": "image-feature-extraction"}),
        ({"num_classes": 1000, "classes": tuple(imagenet_classes())}, {"datasets": ["imagenet-1k"]}),
    ],
    ids=["licence", "backbone", "ImageNet"],
)
def test_the_head_says_what_the_network_is(changes, expected):
    described = dataclasses.replace(INFO, sha256="0", source={}, **changes)
    data = ModelCard(card(described, Statements("net", "hf-hub:me/net", "My own terms, 2"))).data.to_dict()
    assert expected.items() <= data.items() and not {"model-index", "metrics", "base_model"} & set(data)


@pytest.mark.parametrize("dialect", ["mmpretrain", "torchvision", "megvii"])
def test_the_config_is_timms(dialect):
    """timm's fields describe the input in RGB from 0 to 1, whatever the network takes."""
    rules, table = DIALECTS[dialect], TABLES[1.0]
    described = ModelInfo(
        width=1.0,
        layout=rules.layout,
        num_classes=1000,
        preprocess=rules.preprocess_of(table),
        classes=tuple(imagenet_classes()),
    )
    config = config_of(described, "MIT")
    assert config["architecture"] == "shufflenet_v2_x1_0" and config["num_features"] == 1024
    assert config["label_names"][:2] == ["n01440764", "n01443537"]
    assert config["label_descriptions"]["n01440764"] == "tench"
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["pool_size"], cfg["crop_pct"]) == ([3, 224, 224], [7, 7], 0.875)
    if dialect == "megvii":
        assert_allclose(cfg["mean"], 0)
        assert_allclose(cfg["std"], 1 / 255, atol=1e-6)
    else:  # Rounded: MMPretrain's are ImageNet's usual ones times 255, to three digits.
        assert_allclose(cfg["mean"], [0.485, 0.456, 0.406], atol=1e-5)
        assert_allclose(cfg["std"], [0.229, 0.224, 0.225], atol=1e-5)


NETWORKS = {
    "BGR": ({"layout": "megvii"}, "megvii", 3),
    "small stem": ({"small_stem": True}, "mmpretrain", 3),
    "without conv5": ({"num_classes": 0, "conv5": False}, "mmpretrain", 3),
    "five channels": ({"num_classes": 0}, "torchvision", 5),
}


@pytest.mark.parametrize(("settings", "dialect", "channels"), NETWORKS.values(), ids=NETWORKS)
def test_any_network_comes_back_whole(settings, dialect, channels, tmp_path):
    preprocess = DIALECTS[dialect].preprocess_of(TABLES[0.5]).with_channels(channels).with_side((192, 256))
    usual = {"width": 0.5, "layout": "torchvision", "num_classes": 5, "in_chans": channels, "preprocess": preprocess}
    described = ModelInfo(**(usual | settings))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), variable_shapes(module_of(described)))
    described = dataclasses.replace(described, sha256=hash_of_variables(variables))
    save_repository(tmp_path, variables, described, "MIT")
    module, again, found = load_model(tmp_path)
    assert (module, found, hash_of_variables(again)) == (module_of(described), described, described.sha256)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_names_of_classes_are_read_from_where_timm_has_them(repository, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "net")
    edit(folder, label_names=["x", "y", "z"])
    assert snet.get_model(folder).info.classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit(folder, num_classes=4), "is damaged: model.json names 3 classes, but num_classes is 4"),
        (lambda folder: edit(folder, shufflenet_jax=None), "describes shufflenet_v2, not a network that"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "but no config.json; fetch both files"),
        (lambda folder: edit(folder, num_classes=4, label_names=None), "holds other tensors than the network"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"hello"), "is damaged or no safetensors file"),
    ],
)
def test_a_damaged_folder_is_one_line(damage, message, repository, tmp_path, refused):
    folder = shutil.copytree(repository, tmp_path / "net")
    damage(folder)
    assert message in refused(info.main, "--checkpoint", folder)


def test_changed_weights_are_refused(repository, tmp_path, refused):
    folder = shutil.copytree(repository, tmp_path / "net")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert "damaged: its numbers are not those that were saved" in refused(info.main, "--checkpoint", folder)


@pytest.mark.parametrize("name", ["hf-hub:net", "hf-hub:me/net/more", "hf-hub:", "hf-hub:me/net@", "hf-hub:me/a b"])
def test_other_addresses_are_refused(name, refused):
    assert f"{name} names no repository; write hf-hub:OWNER/NAME" in refused(info.main, "--checkpoint", name)
    with pytest.raises(InputError, match="names no repository"):
        snet.get_model(name)


def test_what_cannot_be_published_is_refused(model, repository, tmp_path, refused):
    argv = (model, "--out", tmp_path, "--licence", "MIT")
    assert "--name is None" in refused(publish.main, *argv)
    assert "names no repository" in refused(publish.main, *argv, "--push", "me/net")
    assert "holds no moving averages" in refused(publish.main, repository, *argv[1:], "--name", "a", "--ema")
    assert not os.listdir(tmp_path)


def test_a_repository_needs_no_conversion(refused):
    assert "hf-hub:me/net needs no conversion" in refused(from_torch.main, "hf-hub:me/net")


# Read from the Hub, and pushed to it


READ = [
    "load hf-hub:me/net",
    "info --checkpoint hf-hub:me/net@v1 --json",
    f"info --checkpoint hf-hub:me/net@{COMMIT} --json",
    "predict image.png --checkpoint hf-hub:me/net --topk 1",
    "export hf-hub:me/net --format safetensors --out net.safetensors",
    f"HF_TOKEN={TOKEN} info --checkpoint hf-hub:me/private --json",
]
REFUSALS = {
    "gated": "hf-hub:me/gated is gated; accept its conditions on its page, and log in with",
    "missing": "there is no hf-hub:me/missing, or it is private and this machine may not read it (HTTP 404",
    "forbidden": "config.json of hf-hub:me/forbidden cannot be downloaded",
    "net@v9": "hf-hub:me/net has no revision v9; correct it",
    "empty": "config.json of hf-hub:me/empty cannot be downloaded: it does not exist there; give a repository that",
    "weightless": f"model.safetensors of hf-hub:me/weightless@{COMMIT} cannot be downloaded: it does not exist there",
    "resnet": "config.json describes resnet50, not a network that publish wrote; give one of those",
    "bert": "config.json describes BertModel, not a network that publish wrote; give one of those",
    "damaged": f"model.safetensors of hf-hub:me/damaged@{COMMIT} is damaged: its hash is",
}
PUSHED = f"HF_TOKEN={TOKEN} publish net --out pushed --licence MIT --push hf-hub:me/pets"
UNAUTHORIZED = "HF_TOKEN=hf_wrong publish net --out refused --licence MIT --push hf-hub:me/pets"


@pytest.fixture(scope="module")
def session(model, repository, tmp_path_factory):
    """({line: (status, stdout, stderr)} with a Hub, the same without, the Hub, the folder they ran in)."""
    root = tmp_path_factory.mktemp("session")
    shutil.copytree(model, root / "net")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(root / "image.png")
    hosted = root / "hosted/me"
    for name in ("net", "private", "damaged", "weightless"):
        shutil.copytree(repository, hosted / name)
    (hosted / "weightless/model.safetensors").unlink()
    for name, config in {"resnet": {"architecture": "resnet50"}, "bert": {"architectures": ["BertModel"]}}.items():
        (hosted / name).mkdir()
        (hosted / name / "config.json").write_text(json.dumps(config))
    lines = [
        "info --checkpoint hf-hub:me/private",
        *READ,
        *(f"info --checkpoint hf-hub:me/{name}" for name in REFUSALS),
    ]
    with hub(root / "hosted") as server:
        online = run_lines([*lines, PUSHED, UNAUTHORIZED], root, HF_ENDPOINT=server.address)
        asked = list(server.asked)
        offline = run_lines([READ[0], "info --checkpoint hf-hub:me/never"], root, HF_HUB_OFFLINE="1")
    return online, offline, asked, server.posted, root


@pytest.mark.parametrize("line", READ, ids=lambda line: line[:40])
def test_a_repository_is_a_checkpoint(line, session):
    status, stdout, stderr = session[0][line]
    if line.startswith("load"):
        assert stderr == "" and status[1] == hash_of_variables(load_model(session[4] / "net")[1])
        assert ModelInfo.from_json(status[2]).classes == INFO.classes
    else:
        assert status == 0, stderr
        assert {"info": '"num_classes": 3', "predict": "%", "export": "wrote net.safetensors"}[
            line.removeprefix(f"HF_TOKEN={TOKEN} ").partition(" ")[0]
        ] in stdout


def test_each_file_is_downloaded_once(session):
    gets = [entry for entry in session[2] if entry.startswith("GET me/net@")]
    assert gets == ["GET me/net@main config.json", f"GET me/net@{COMMIT} model.safetensors"]


@pytest.mark.parametrize("name", REFUSALS)
def test_a_repository_that_cannot_be_read_is_one_line(name, session):
    status, stdout, stderr = session[0][f"info --checkpoint hf-hub:me/{name}"]
    (line,) = [line for line in stderr.splitlines() if not line.startswith("downloading ")]
    assert (status, stdout) == (2, "") and line.startswith("error: ") and REFUSALS[name] in line


def test_a_private_repository_needs_a_token(session):
    status, _, stderr = session[0]["info --checkpoint hf-hub:me/private"]
    assert status == 2 and stderr.splitlines()[-1] == (
        "error: there is no hf-hub:me/private, or it is private and this machine may not read it (HTTP 401 "
        "Unauthorized); correct the name, or log in with `hf auth login` or set HF_TOKEN"
    )


def test_what_was_read_once_is_read_without_a_network(session):
    online, offline = session[:2]
    assert offline[READ[0]] == online[READ[0]]
    status, _, stderr = offline["info --checkpoint hf-hub:me/never"]
    assert (
        status == 2 and "error: config.json of hf-hub:me/never cannot be downloaded: it is not in the cache" in stderr
    )
    assert "try again with a connection, and without HF_HUB_OFFLINE" in stderr


def test_a_pushed_repository_holds_what_publish_wrote(session):
    online, _, _, posted, root = session
    status, stdout, stderr = online[PUSHED]
    assert status == 0 and "pushed to hf-hub:me/pets" in stderr, stderr
    folder = root / stdout.strip()
    created, *_ = (json.loads(body) for path, _, body in posted if path == "/api/repos/create")
    assert created["name"] == "pets" and created["organization"] == "me"
    ((path, token, body),) = [entry for entry in posted if "/commit/" in entry[0]]
    assert path == "/api/models/me/pets/commit/main" and token == f"Bearer {TOKEN}"
    assert files_in_commit(body) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert 'get_model("hf-hub:me/pets")' in (folder / "README.md").read_text()


def test_a_refused_push_leaves_nothing(session):
    status, stdout, stderr = session[0][UNAUTHORIZED]
    assert (status, stdout) == (2, "")
    line = stderr.splitlines()[-1]
    assert line.startswith("error: hf-hub:me/pets cannot be written (HTTP 401") and "log in with" in line
    assert not os.listdir(session[4] / "refused")
