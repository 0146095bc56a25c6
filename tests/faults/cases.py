"""Cases: a command on inputs of which one is damaged, and what a right answer is. Each depends on its seed and index
alone."""

import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shufflenet_jax.config import TrainConfig
from shufflenet_jax.porting import dialects

from . import mutations
from .originals import TRAINING


@dataclass
class Case:
    """One command.

    `argv` runs in the folder cwd; inputs lie beside it in `in`, and all that may appear in `out`. What `may_change`
    names there (regular expressions of paths) may do so even where the command fails.
    """

    argv: list
    told: str  # What is wrong.
    statuses: tuple = (0, 2)
    may_change: tuple = ()
    right: Callable = lambda answer, again: []  # (Answer, a way to run a further command) -> faults of a result.
    images: int = 1  # So many `error:` lines there may be.
    talks: bool = False  # Whether it tells on stderr how it goes.


@dataclass
class Scene:
    """Where a case is made."""

    rng: random.Random
    place: Path
    originals: object
    told: list = field(default_factory=list)

    @property
    def inputs(self):
        return self.place / "in"

    @property
    def out(self):
        return self.place / "out"

    @property
    def canary(self):
        return self.place / "code-ran"

    def copy(self, original, name):
        """A copy of an original among the inputs."""
        target = self.inputs / name
        (shutil.copytree if original.is_dir() else shutil.copy)(original, target)
        return target

    def say(self, words):
        self.told.append(words)

    def case(self, *argv, **settings):
        told = re.sub(r"\b[0-9a-f]{32}\b", "a part", "; ".join(self.told))  # Orbax's names are random.
        return Case([str(word) for word in argv], told, **settings)


# What is right


def json_of(answer):
    return json.loads(answer.stdout.strip().splitlines()[-1])


def figures_are(expected=None, images=12):
    """The figures of an evaluation must be finite, of that many images, and equal to the expected ones, if given."""

    def right(answer, again):
        found = json_of(answer)
        if expected is not None and found != expected:
            return [f"other figures: {found} instead of {expected}"]
        finite = all(math.isfinite(value) for value in found.values() if isinstance(value, float))
        return [] if finite and found["images"] == images else [f"wrong figures: {found}"]

    return right


def tensors_in(path):
    """{bare key: tensor} of a checkpoint file; what else it holds beside the tensors is no part of the network."""
    content = torch.load(path, weights_only=True)
    named = content.get("state_dict", content).items()
    return {dialects.bare(key.removeprefix("module.")): value for key, value in named if torch.is_tensor(value)}


def same_tensors(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if value.dtype == second[key].dtype else (value.double() == second[key]).all()
        for key, value in first.items()
    )


def converted(path, model, back, dialect):
    """A model directory must come back as the tensors of the file that it was made of."""

    def right(answer, again):
        returned = again("convert-back", model, "--dialect", dialect, "--out", back)
        if returned.status != 0:
            return [f"what was written cannot be read: {returned.stderr}"]
        return [] if same_tensors(tensors_in(path), tensors_in(back)) else ["other tensors than the file's"]

    return right


def digest_of(folder):
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()


# Kinds


def damaged_torch_file(scene, dialect):
    form = scene.rng.choice(("zip", "legacy"))
    path = scene.copy(scene.originals.torch_file(dialect, form), "net.pth")
    scene.say(f"{dialect}, {form}")
    chance = scene.rng.random()
    if chance < 0.3:
        scene.say(mutations.damage_file(scene.rng, path))
    elif chance < 0.5 and form == "zip":
        data, told = mutations.damage_torch_zip(scene.rng, path.read_bytes(), scene.canary)
        path.write_bytes(data)
        scene.say(told)
    elif chance < 0.58:
        told, make = scene.rng.choice(list(mutations.PICKLES.items()))
        path.write_bytes(make(scene.canary))
        scene.say(f"pickle: {told}")
    elif chance < 0.63:
        scene.say(mutations.damage_entry(scene.rng, path))
    else:
        content = torch.load(path, weights_only=True)
        changed, told = mutations.damage_tensors(scene.rng, content.get("state_dict", content), scene.canary)
        if "state_dict" in content and isinstance(changed, dict) and "state_dict" not in changed:
            changed = {**content, "state_dict": changed}
        torch.save(changed, path, _use_new_zipfile_serialization=form == "zip")
        scene.say(told)
    return path


def convert(scene):
    dialect = scene.rng.choice(list(dialects.DIALECTS))
    path = damaged_torch_file(scene, dialect)
    model, back = scene.out / "model", scene.out / "back.pth"
    options = ["--no-verify"] + (["--ema"] if scene.rng.random() < 0.05 else [])
    return scene.case("convert", path, "--out", model, *options, right=converted(path, model, back, dialect))


def torch_file_used(scene):
    path = damaged_torch_file(scene, "mmpretrain")
    if scene.rng.random() < 0.5:
        return scene.case("info", "--checkpoint", path)
    return scene.case("publish", path, "--out", scene.out, "--name", "net", "--licence", "MIT")


def damaged_model(scene):
    """(A model directory, whether its weights can only be right or found wrong)."""
    path = scene.copy(scene.originals.model(), "model")
    chance = scene.rng.random()
    if chance < 0.35:
        scene.say(mutations.damage_json_file(scene.rng, path / "model.json", keep=("source", "metrics")))
        return path, False
    if chance < 0.45:
        scene.say(mutations.damage_entry(scene.rng, scene.rng.choice((path, path / "model.json", path / "variables"))))
        return path, True
    if chance < 0.55:
        scene.say(mutations.damage_json_file(scene.rng, path / "variables/_METADATA"))
        return path, True
    if chance < 0.62:
        metadata = path / "variables/_METADATA"
        escape = scene.rng.choice(("../../../escape", "/dev/zero", str(scene.place / "escape")))
        metadata.write_text(metadata.read_text().replace("conv5", escape))
        scene.say(f"_METADATA names {escape}")
        return path, True
    scene.say(mutations.damage_folder(scene.rng, path / "variables"))
    return path, True


def convert_back(scene):
    path, exact = damaged_model(scene)
    target = scene.out / "net.pth"
    expected = tensors_in(scene.originals.torch_file("mmpretrain", "zip"))

    def right(answer, again):
        return [] if not exact or same_tensors(expected, tensors_in(target)) else ["other tensors than before"]

    return scene.case("convert-back", path, "--dialect", "mmpretrain", "--out", target, right=right)


def model_used(scene):
    path, exact = damaged_model(scene)
    command = scene.rng.choice(("eval", "eval", "predict", "info", "publish"))
    if command == "info":
        return scene.case("info", "--checkpoint", path, "--json")
    if command == "publish":
        return scene.case("publish", path, "--out", scene.out, "--name", "net", "--licence", "MIT")
    images = scene.originals.images()
    if command == "predict":
        return scene.case("predict", images / "val/kind0/6.png", "--checkpoint", path, "--json", right=predicted)
    expected = json.loads(scene.originals.figures().read_text())
    return scene.case("eval", "--checkpoint", path, "--data", images, right=figures_are(expected if exact else None))


def tensors_used(scene):
    """A damaged .safetensors file; its header may come to describe another preparation of images."""
    path = scene.copy(scene.originals.tensors(), "net.safetensors")
    damage = mutations.damage_file if scene.rng.random() < 0.85 else mutations.damage_entry
    scene.say(damage(scene.rng, path))
    command = scene.rng.choice(("eval", "info", "export"))
    if command == "eval":
        return scene.case("eval", "--checkpoint", path, "--data", scene.originals.images(), right=figures_are())
    if command == "info":
        return scene.case("info", "--checkpoint", path)
    return scene.case("export", path, "--format", "safetensors", "--out", scene.out / "net.safetensors")


def predicted(answer, again):
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    scores = [entry["score"] for row in rows for entry in row["topk"]]
    return [] if all(0 <= score <= 1 for score in scores) else [f"no probabilities: {scores}"]


def damaged_data(scene):
    """(--data and its options, how many images there are)."""
    form = scene.rng.choice(("images", "listed", "records"))
    path = scene.copy(getattr(scene.originals, form)(), "data")
    if form == "records":
        chance = scene.rng.random()
        folder = path / "pets/1.0.0"
        if chance < 0.3:
            chosen = scene.rng.choice(("dataset_info.json", "features.json"))
            scene.say(mutations.damage_json_file(scene.rng, folder / chosen))
        else:
            scene.say(mutations.damage_folder(scene.rng, folder))
        return ["tfds:pets", "--data-dir", path]
    chance = scene.rng.random()
    image = scene.rng.choice(sorted((path / "val").rglob("*.*")))
    if form == "listed" and chance < 0.4:
        listing = path / "meta/val.txt"
        if scene.rng.random() < 0.5:
            scene.say(mutations.damage_file(scene.rng, listing))
        else:
            lines = ["../../escape.jpg 0", "/etc/passwd 1", "x.jpg -1", "x.jpg 9999999", "x.jpg \u0663", "a\0b.jpg 1"]
            line = scene.rng.choice([*lines, "x" * 10**6 + " 1", "kind0/0.png 999999999999", "/dev/zero 0", ". 1"])
            listing.write_text(listing.read_text() + line + "\n")
            scene.say(f"the list has {line[:30]!r}")
    elif chance < 0.8:
        scene.say(mutations.damage_image(scene.rng, image))
    else:
        scene.say(mutations.damage_entry(scene.rng, scene.rng.choice((image, image.parent, path / "val", path))))
    return [path]


def data_used(scene):
    data = damaged_data(scene)
    if scene.rng.random() < 0.5:
        preview = ("--preview", scene.out / "preview.png") if scene.rng.random() < 0.05 else ()
        return scene.case("verify", *data, *preview, statuses=(0, 1, 2))

    def right(answer, again):  # Fewer images are right where some were taken away.
        return figures_are(images=json_of(answer)["images"])(answer, again)

    return scene.case("eval", "--checkpoint", scene.originals.model(), "--data", *data, right=right)


def images_predicted(scene):
    count, paths = scene.rng.choice((1, 1, 3)), []
    images = sorted((scene.originals.images() / "val").rglob("*.*"))
    for number in range(count):
        image = scene.rng.choice(images)
        paths.append(scene.copy(image, f"{number}{image.suffix}"))
        if scene.rng.random() < 0.85:
            scene.say(mutations.damage_image(scene.rng, paths[-1]))
        else:
            scene.say(mutations.damage_entry(scene.rng, paths[-1]))
    model = scene.originals.model()
    options = ["--save-picture", scene.out / "picture.png"] if scene.rng.random() < 0.1 else ["--json"]
    right = predicted if options == ["--json"] else lambda answer, again: []
    # The picture of those that can be read is kept beside the errors of the others.
    changing = (r"picture\.png",) if count > 1 else ()
    # A link to the folder stands for all in it; and it may tell that nothing is left to draw.
    lines = count * count + 1
    words = ("predict", *paths, "--checkpoint", model, *options)
    return scene.case(*words, images=lines, right=right, may_change=changing)


def prepare(scene):
    form = scene.rng.choice(("zip", "zip", "tar", "tar", "folder", "tfrecords"))
    options = ["--processes", 1]
    if form == "zip":
        source = scene.inputs / "images.zip"
        data, told = mutations.damage_zip(scene.rng, scene.originals.members(), scene.place / "escape")
        source.write_bytes(data)
    elif form == "tar":
        source = scene.inputs
        tars = scene.originals.official()
        damaged = scene.rng.choice(list(tars))
        for name, members in tars.items():
            data, words = mutations.tar_of(members), ""
            if name == damaged:
                data, told = mutations.damage_tar(scene.rng, members, scene.place / "escape")
            (source / name).write_bytes(data)
    elif form == "folder":
        source = scene.copy(scene.originals.images(), "data")
        image = scene.rng.choice(sorted(source.rglob("*.*")))
        if scene.rng.random() < 0.7:
            told = mutations.damage_image(scene.rng, image)
        else:
            told = mutations.damage_entry(scene.rng, scene.rng.choice((image, image.parent, source)))
    else:
        source = scene.copy(scene.originals.tfrecords(), "records")
        told = mutations.damage_folder(scene.rng, source)
    scene.say(told)
    if form != "tfrecords" and scene.rng.random() < 0.4:
        options.append("--skip-damaged")
    if form != "tfrecords" and scene.rng.random() < 0.3:
        options += ["--short-edge", 32]
    may_change = ("pets", r"pets/1\.\d\.\d\.incomplete.*")  # Where the same command goes on.
    words = ("prepare", "--source", source, "--name", "pets", "--out", scene.out, *options)

    def right(answer, again):
        counts = {k: v for k, v in json_of(answer).items() if k not in ("name", "folder", "left_out")}
        for split, count in counts.items():
            looked = again("verify", "tfds:pets", "--data-dir", scene.out, "--split", split)
            # Records are copied as they are: what is told of their labels may be damaged.
            whole = looked.status == 0 or form == "tfrecords"
            if not whole or json_of(looked)["images"] != count:
                return [f"what was prepared is not whole: {looked.stdout} {looked.stderr}"]
        return []

    return scene.case(*words, right=right, may_change=may_change)


def plot(scene):
    run = scene.out / "run"
    run.mkdir()
    path = run / "metrics.jsonl"
    rows = [
        {"step": s, "epoch": s / 3, "split": split, "loss": 2 / s, "top1": 9.5, "top5": 50.0, "lr": 0.1}
        for s in range(1, 7)
        for split in ("train", "eval")
    ]
    lines = [json.dumps(row) for row in rows]
    place = scene.rng.randrange(len(lines))
    chance = scene.rng.random()
    path.write_text("\n".join(lines) + "\n")
    if chance < 0.35:
        scene.say(mutations.damage_file(scene.rng, path))
    elif chance < 0.5:
        scene.say(mutations.damage_entry(scene.rng, scene.rng.choice((path, run))))
    else:
        lines[place], told = mutations.damage_json(scene.rng, lines[place])
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        scene.say(f"line {place}: {told}")
    return scene.case("plot", run, may_change=(r"run/curves\.png",))


def compare(scene):
    path = scene.copy(scene.originals.predictions(), "other.npz")
    scene.say(mutations.damage_npz(scene.rng, path, scene.canary))
    words = ("--checkpoint", scene.originals.model(), "--data", scene.originals.images(), "--compare", path)

    def right(answer, again):
        found = json_of(answer)["compare"]
        return [] if 0 <= found["agreement"] <= 100 and 0 <= found["p_value"] <= 1 else [f"wrong figures: {found}"]

    return scene.case("eval", *words, right=right)


def overrides(scene):
    """A word of a training's command line that cannot be, or is odd."""
    settings = [name.replace("_", "-") for name in TrainConfig.__dataclass_fields__]
    values = [*mutations.WORDS, *map(str, mutations.WILD), "none", "[]", "1,2", "True", "-5", "1e400", "0x10", "\uff11"]
    words = ["train", *TRAINING, "--workdir", scene.out / "run"]
    for _ in range(scene.rng.choice((1, 1, 2, 3))):
        name, value = scene.rng.choice(settings), scene.rng.choice(values)
        if scene.rng.random() < 0.3:
            value = scene.rng.choice(("0", "1", "2", "100", "0.5", "constant", "cosine", "bfloat16", "tfds:pets"))
        words += [f"--{name}"] if scene.rng.random() < 0.05 else [f"--{name}", value]
        scene.say(f"{name} is {value[:30]!r}")
    return scene.case(*words, "--print-schedule", talks=True, may_change=("run.*",))


def resume(scene):
    """A training that goes on from a damaged folder."""
    run = scene.out / "run"
    shutil.copytree(scene.originals.workdir(), run)
    chance = scene.rng.random()
    if chance < 0.2:
        scene.say(mutations.damage_json_file(scene.rng, run / "config.json"))
    elif chance < 0.4:
        scene.say(mutations.damage_file(scene.rng, run / "metrics.jsonl"))
    elif chance < 0.5:
        rows = (run / "metrics.jsonl").read_text().splitlines()
        rows[0], told = mutations.damage_json(scene.rng, rows[0])
        (run / "metrics.jsonl").write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
        scene.say(told)
    elif chance < 0.9:
        scene.say(mutations.damage_folder(scene.rng, run / "checkpoints"))
    else:
        scene.say(mutations.damage_entry(scene.rng, scene.rng.choice(sorted(run.iterdir()))))
    return scene.case("train", *TRAINING, "--workdir", run, talks=True, may_change=("run.*",))


def training_files(scene):
    """A training with a damaged teacher, beginning or weights of classes."""
    words = ["train", *TRAINING, "--workdir", scene.out / "run"]
    kind = scene.rng.choice(("teacher", "teacher", "init-from", "class-weights"))
    if kind == "teacher":
        path = scene.copy(scene.originals.teacher(), "teacher.npz")
        scene.say(mutations.damage_npz(scene.rng, path, scene.canary))
    elif kind == "init-from":
        path, _ = damaged_model(scene)
    else:
        path = scene.inputs / "weights.txt"
        path.write_text("1\n" * 10)
        scene.say(mutations.damage_file(scene.rng, path))
    return scene.case(*words, f"--{kind}", path, talks=True, may_change=("run.*",))


def bad_places(scene):
    """Where nothing can be written."""
    place = scene.inputs
    (place / "file").write_text("here first")
    (place / "loop").symlink_to("loop")
    os.mkfifo(place / "pipe")
    (place / "broken").symlink_to("nowhere/at/all")
    bad = scene.rng.choice(
        (
            place / "file/below",
            place / "loop",
            place / "loop/below",
            "/dev/null/below",
            "/proc/below",
            "/proc/self/mem/x",
            place / ("x" * 300),
            place / ("x/" * 3000),
            f"{place}/a\0b",
            "~nobody-at-all/x",
            place / "pipe",
        )
    )
    scene.say(f"to be written to {str(bad).removeprefix(str(place))[:40]!r}")
    model, images = scene.originals.model(), scene.originals.images()
    argv = scene.rng.choice(
        (
            ("convert", scene.originals.torch_file("torchvision", "zip"), "--no-verify", "--out", bad),
            ("convert-back", model, "--dialect", "torchvision", "--out", bad),
            ("eval", "--checkpoint", model, "--data", images, "--predictions", bad),
            ("eval", "--checkpoint", model, "--data", images, "--report", bad),
            ("predict", images / "val/kind0/6.png", "--checkpoint", model, "--save-picture", bad),
            ("predict", images / "val/kind0/6.png", "--checkpoint", model, "--features", bad),
            ("publish", model, "--name", "net", "--licence", "MIT", "--out", bad),
            ("export", model, "--format", "safetensors", "--out", bad),
            ("prepare", "--source", images, "--name", "pets", "--processes", 1, "--out", bad),
            ("verify", images, "--preview", bad),
            ("plot", bad),
            ("train", *TRAINING, "--workdir", bad),
            ("train", *TRAINING, "--print-schedule", bad),
        )
    )
    return scene.case(*argv, statuses=(2,), talks=True)


def names(scene):
    """Words of the command line that name nothing, or something odd."""
    word = scene.rng.choice(
        [*mutations.WORDS, "/dev/zero", "/dev/random", "/proc/self/mem", ".", "..", "x" * 300, "tfds:", "tfds:..",
         "tfds:../../x", "tfds:/etc", "tfds:a b", "tfds:a\0b", "tfds:" + "x" * 300, "\udcff.jpg", "http://[",
         "https://x y", "http://127.0.0.1:1/x.jpg", "file:///etc/passwd", "*", "[", "-", "digits", "{}",
         "~nobody-at-all/x"]
    )  # fmt: skip
    scene.say(f"the name {word[:40]!r}")
    model, images = scene.originals.model(), scene.originals.images()
    argv = scene.rng.choice(
        (
            ("convert", word, "--no-verify", "--out", scene.out / "model"),
            ("convert-back", word, "--dialect", "torchvision", "--out", scene.out / "net.pth"),
            ("eval", "--checkpoint", word, "--data", images),
            ("eval", "--checkpoint", model, "--data", word),
            ("eval", "--checkpoint", model, "--data", images, "--split", word),
            ("eval", "--checkpoint", model, "--data", images, "--compare", word),
            ("eval", "--checkpoint", model, "--data", "tfds:pets", "--data-dir", word),
            ("predict", word, "--checkpoint", model),
            ("predict", images / "val/kind0/6.png", "--checkpoint", word),
            ("info", "--checkpoint", word),
            ("publish", model, "--name", word, "--licence", "MIT", "--out", scene.out),
            ("publish", word, "--name", "net", "--licence", "MIT", "--out", scene.out),
            ("prepare", "--source", images, "--name", word, "--processes", 1, "--out", scene.out),
            ("prepare", "--source", word, "--name", "pets", "--processes", 1, "--out", scene.out),
            ("verify", word),
            ("plot", word),
            ("train", *TRAINING, "--data", word if word != "digits" else "x", "--workdir", scene.out / "run"),
            ("train", "--config", word, "--workdir", scene.out / "run"),
            ("train", *TRAINING, "--teacher", word, "--workdir", scene.out / "run"),
            ("train", *TRAINING, "--init-from", word, "--workdir", scene.out / "run"),
            ("train", *TRAINING, "--class-weights", word, "--workdir", scene.out / "run"),
            ("info", "--resolution", word),
            (word,),
        )
    )
    statuses = (0, 1, 2) if argv[0] == "verify" else (0, 2)
    return scene.case(*argv, statuses=statuses, talks=True, may_change=("run.*", "pets.*"))


KINDS = {  # name: (how often, what makes it)
    "convert": (24, convert),
    "torch file used": (3, torch_file_used),
    "convert back": (8, convert_back),
    "model used": (13, model_used),
    "tensors used": (4, tensors_used),
    "data used": (16, data_used),
    "images predicted": (10, images_predicted),
    "prepare": (12, prepare),
    "plot": (6, plot),
    "compare": (5, compare),
    "overrides": (8, overrides),
    "resume": (1.5, resume),
    "training files": (1.5, training_files),
    "bad places": (7, bad_places),
    "names": (8, names),
}
