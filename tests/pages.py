"""README and docs as their readers use them: the commands and the Python of a page in order, and what readers have.

`tests/test_docs.py` follows README, `tests/slow/test_docs.py` the pages of docs; those in LONG take minutes.
"""

import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from typing import NamedTuple

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from conftest import ROOT, lively_network
from PIL import Image
from small_training import few_units

from shufflenet_jax import __main__, architecture, config, lowerings, published
from shufflenet_jax.commands import evaluate, from_torch, to_torch, train
from shufflenet_jax.data.labels import imagenet_classes
from shufflenet_jax.files import hash_of
from shufflenet_jax.porting import dialects

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "train.py": train.main,
    "eval.py": evaluate.main,
    "convert/from_torch.py": from_torch.main,
    "convert/to_torch.py": to_torch.main,
}
LONG = ("hosts", "training", "faster", "laboratory")
# The commands keep their words; these behind them make them short.
SHORTER = {
    "train": shlex.split(
        "--steps 2 --batch-size 8 --bn-group-size 0 --eval-batch-size 8 --image-size 32 --eval-every 100"
    ),
    "eval": ["--limit", "2"],
    "benchmarks/distillation": ["--epochs", "1", "--teacher-epochs", "1", "--seeds", "1"],
    "benchmarks/evaluation": ["--rounds", "1"],
    "benchmarks/input_pipeline": ["--rounds", "1", "--seconds", "0.2"],
    "benchmarks/model": ["--rounds", "1", "--seconds", "0.1", "--only", "ours", "PyTorch"],
    "benchmarks/second_core": ["--rounds", "1", "--seconds", "0.05"],
    "benchmarks/startup": ["--rounds", "1"],
    "benchmarks/training_loop": ["--rounds", "1", "--steps", "1", "--batch-size", "1"],
}
SMALLER = {
    '"train": 100, "val": 50': '"train": 4, "val": 2',
    "range(5)": "range(2)",
    "range(6)": "range(1)",
}  # In Python.
# Invisible to the reader, a comment before a block says what no test has: its commands are not run.
BLOCK = re.compile(r"^(?:<!-- needs: ([^\n]+) -->\n)?```(sh|python)\n(.*?)^```", re.M | re.S)
# Needs ImageNet, or minutes where it is no block that says less.
NOT_ALONE = re.compile(r"benchmarks/|train.py --config in1k$")
INLINE = re.compile(r"`(python [^`]*?\.py[^`]*|python -m shufflenet_jax [^`]*)`")


class Step(NamedTuple):
    """A command line of a page, or a block of its Python."""

    kind: str  # "sh", "python", or "inline": a command in a table or sentence.
    text: str
    needs: str = ""

    @property
    def words(self):
        """The command line as words, without what a shell keeps for itself."""
        words = shlex.split(self.text.rstrip("& ").replace("\n", " "), comments=True)
        return words[len(self.variables) :]

    @property
    def variables(self):
        """The environment variables in front of a command."""
        words = itertools.takewhile(lambda word: re.match(r"[A-Z_]+=", word), self.text.split())
        return dict(word.split("=", 1) for word in words)


def steps(page):
    """The Steps of a page: its blocks in order, then the commands in its sentences."""
    text = page.read_text()
    for needs, language, block in BLOCK.findall(text):
        parts = [block] if language == "python" else block.replace("\\\n", " ").splitlines()
        yield from (Step(language, part, needs) for part in parts if part.strip())
    yield from (Step("inline", line) for line in INLINE.findall(BLOCK.sub("", text)))


def follow(page, call):
    """Does all that a page tells its reader to do, but for what needs what no test has.

    Its blocks come in their order, then the commands in its sentences, conversions first; benchmarks are the blocks'.
    """
    names, processes, told = {}, [], list(steps(page))
    for step in told:
        if step.kind == "python" and not step.needs:
            text = step.text
            for usual, smaller in SMALLER.items():
                text = text.replace(usual, smaller)
            exec(text, names)
        elif step.kind == "sh" and not step.needs:
            processes.append(follow_command(step, call))
    assert all(process.wait() == 0 for process in processes if process)
    inline = [step for step in told if step.kind == "inline" and not NOT_ALONE.search(step.text)]
    for step in sorted(inline, key=lambda step: "convert/" not in step.text):
        follow_command(step._replace(text=step.text.replace("WORKDIR", "runs/digits")), call)
    matplotlib.pyplot.close("all")


def follow_command(step, call):
    """Runs a command line in this process; a benchmark, and what begins with variables or ends with &, in another one.

    The latter, a training, is returned as it runs, for others to run beside it.
    """
    words, command = step.words, command_of(step.words)
    name = words[3] if words[1] == "-m" else words[1].removesuffix(".py")
    shorter = SHORTER.get(name, [])
    if command is None:
        script = words[1] if os.path.exists(words[1]) else ROOT / words[1]
        subprocess.run([sys.executable, script, *words[2:], *shorter], check=True)
        return None
    main, argv = command
    if step.variables or step.text.rstrip().endswith("&"):
        script = [sys.executable, ROOT / "tests/small_training.py"]
        return subprocess.Popen([*script, *argv, *shorter], env={**os.environ, **step.variables})
    if "--help" in argv:
        with pytest.raises(SystemExit, match=r"^0$"):
            main(argv)
        return None
    status, _, stderr = call(main, *argv, *shorter)
    missed = status == 1 and "--expect-top1" in words  # Random weights miss what is published.
    assert status == 0 or missed, f"{step.text}\n{stderr}"
    return None


def command_of(words):
    """(its main, the words for it) of a command of ours, or None."""
    if words[:3] == ["python", "-m", "shufflenet_jax"]:
        return __main__.main, words[3:]
    if words[:1] == ["python"] and words[1] in SCRIPTS:
        return SCRIPTS[words[1]], words[2:]
    return None


# What readers have


def save_picture(path, seed, side=72):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side + 10, side)).save(path)


def save_classes(root, classes, splits=("train", "val"), images=2):
    """Class folders of random pictures."""
    for number, (split, kind, image) in enumerate(itertools.product(splits, classes, range(images))):
        save_picture(root / split / kind / f"{image}.JPEG", number)


def tar_of(files):
    """The bytes of a tar of (name, bytes)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(folder.rglob("*.JPEG")):
            file.write(image, image.relative_to(folder))


def save_tars(folder, picture):
    """ILSVRC2012's tars with a few images."""
    folder.mkdir()
    inner = [(f"{wnid}.tar", tar_of([(f"{wnid}_1.JPEG", picture)])) for wnid in list(imagenet_classes())[:4]]
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    images = [(f"ILSVRC2012_val_{number:08}.JPEG", picture) for number in (1, 2)]
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(images))


def save_readers_things(root):
    """The pages' FOLDER, FEW, tars, zips and PyTorch files: small data, and random networks, most of 3 units."""
    save_classes(root / "FOLDER", list(imagenet_classes())[:4])
    save_classes(root / "FEW", ["cat", "dog"], ["train", "test"], images=4)
    save_classes(root / "pets", ["cat", "dog"])
    zip_of(root / "pets", root / "pets.zip")
    for number, kind in enumerate(("cardboard", "glass", "metal", "paper", "plastic", "trash")):
        for image in range(5):
            save_picture(root / "trash" / kind / f"{image}.JPEG", 10 * number + image)
    zip_of(root / "trash", root / "trashnet.zip")
    save_classes(root / "cifar10", [f"kind{i}" for i in range(10)], ["train", "test"])
    zip_of(root / "cifar10", root / "cifar10.zip")
    save_tars(root / "tars", (root / "FOLDER/train/n01440764/0.JPEG").read_bytes())
    with few_units(stage2=1):
        for name in (published.CARD, "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"):
            entry = published.PUBLISHED[name]
            network = lively_network(entry.source.lower(), entry.width, 1000)
            torch.save({"state_dict": network.state_dict()}, root / entry.file)
            shutil.copy(root / entry.file, root / f"{entry.source.upper()}.pth")
    shutil.copy(root / entry.file, root / "CHECKPOINT.pth")
    shutil.copy(root / entry.file, root / "OTHER")
    # For benchmarks, which know nothing of small networks.
    torch.save(lively_network("torchvision", 1.0, 1000).state_dict(), root / "FILE.pth")
    for name in ("VAL650", "TRAIN201", "IMAGENET"):
        shutil.copytree(root / "FOLDER", root / name)
    (root / "docs").mkdir()


def publish(root, monkeypatch):
    """Makes the files of a folder those that the published names download."""
    for name, entry in published.PUBLISHED.items():
        if (root / entry.file).is_file():
            monkeypatch.setitem(published.PUBLISHED, name, entry._replace(sha256=hash_of(root / entry.file)[:8]))
    monkeypatch.setenv(published.MIRROR, root.as_uri())


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder of all that the pages speak of."""
    root = tmp_path_factory.mktemp("things")
    save_readers_things(root)
    return root


@pytest.fixture
def reader(things, tmp_path, monkeypatch):
    """In such a folder; networks have few units, and published ones can be had."""
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "demo", tmp_path / "demo")
    shutil.copytree(ROOT / "docs/trash", tmp_path / "docs/trash")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "home/tensorflow_datasets"))
    publish(things, monkeypatch)
    matplotlib.use("Agg")
    # What extending.md adds to.
    tables = (architecture.TABLES, config.PREPROCESSING, lowerings.MODULES, dialects.DIALECTS)
    kept = [dict(table) for table in tables]
    with few_units(stage2=1):
        yield
    for table, usual in zip(tables, kept, strict=True):
        table.clear()
        table.update(usual)
