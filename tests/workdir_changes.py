"""Changes to the data, the settings and the workdir of a training, and what the same command must make of each."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from fcntl import LOCK_EX, flock
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from small_training import interrupted

from shufflenet_jax.commands import prepare, train
from shufflenet_jax.commands.console import run as run_command
from shufflenet_jax.training import loop

CLASSES, TRAIN, VAL = ("cat", "dog", "owl"), 8, 2
OPTIONS = (
    *("--config", "digits", "--image-size", "16", "--batch-size", "8", "--lowering", "reference"),
    *("--eval-every", "1", "--log-every", "1", "--learning-rate", "0.001", "--workdir", "run"),
)
# Each base is a workdir `run` beside its data. (options, before which step SIGTERM comes, or None)
BASES = {
    "stopped": (("--data", "pets", "--epochs", "3"), 4),
    "constant": (("--data", "pets", "--epochs", "1", "--schedule", "constant"), None),
    "listed": (("--data", "listed", "--epochs", "3"), 4),
    "tfds": (("--data", "tfds:pets", "--data-dir", "sets", "--epochs", "3"), 4),
}


class Change(NamedTuple):
    """A change, and what must happen.

    Attributes:
      said: what the command must say.
      make: changes what lies in the current folder.
      options: added to the command.
      resumes: whether it continues; else it must end with one line, and leave every byte of the workdir as it was.
      base: the run that is changed.
    """

    said: str
    make: Callable[[], object] = lambda: None
    options: tuple[object, ...] = ()
    resumes: bool = False
    base: str = "stopped"


# Data


def picture(path: Path, seed: int, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)


def write_pets() -> None:
    for number, name in enumerate(CLASSES):
        for split, count in (("train", TRAIN), ("val", VAL)):
            for i in range(count):
                picture(Path(f"pets/{split}/{name}/{i}.bmp"), 100 * number + i, side=16 + number)


def write_listed() -> None:
    for split in ("train", "val"):
        shutil.copytree(f"pets/{split}", f"listed/{split}")
        names = sorted(path.relative_to(f"listed/{split}") for path in Path(f"listed/{split}").rglob("*.bmp"))
        Path("listed/meta").mkdir(exist_ok=True)
        lines = (f"{name} {CLASSES.index(name.parent.name)}\n" for name in names)
        Path(f"listed/meta/{split}.txt").write_text("".join(lines))


def prepare_sets() -> None:
    shutil.rmtree("sets", ignore_errors=True)
    argv = ["--source", "pets", "--name", "pets", "--out", "sets", "--processes", "1"]
    assert run_command(prepare.main, argv) == 0


def rename_class(name: str, new: str) -> None:
    for split in ("train", "val"):
        Path(f"pets/{split}/{name}").rename(f"pets/{split}/{new}")


def remove_class(name: str) -> None:
    for split in ("train", "val"):
        shutil.rmtree(f"pets/{split}/{name}")


def add_class(name: str) -> None:
    for split in ("train", "val"):
        picture(Path(f"pets/{split}/{name}/0.bmp"), 900)


def move_data() -> None:
    Path("elsewhere").mkdir()
    Path("pets").rename("elsewhere/animals")


def pack(form: str) -> None:
    shutil.make_archive("packed", form, "pets")
    shutil.rmtree("pets")


def touch_data() -> None:
    for path in Path("pets").rglob("*.bmp"):
        os.utime(path, (1, 1))


def hide_files() -> None:
    Path("pets/train/cat/.hidden.bmp").write_bytes(b"hidden")
    Path("pets/train/cat/notes.txt").write_text("These are cats.")


def edit_pixel() -> None:
    path = Path("pets/train/cat/0.bmp")
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def move_image() -> None:
    Path("pets/train/cat/0.bmp").rename("pets/train/dog/a.bmp")


def swap_classes() -> None:
    rename_class("cat", "x")
    rename_class("dog", "cat")
    rename_class("x", "dog")


def shrink_data() -> None:
    for name in CLASSES:
        for i in range(1, TRAIN):
            Path(f"pets/train/{name}/{i}.bmp").unlink()


def add_image(split: str = "train") -> None:
    picture(Path(f"pets/{split}/cat/a.bmp"), 7)


def remove_image(split: str = "train") -> None:
    Path(f"pets/{split}/cat/0.bmp").unlink()


def edit_list(change: Callable[[list[str]], list[str]]) -> None:
    path = Path("listed/meta/train.txt")
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def prepare_again(change: Callable[[], object]) -> None:
    change()
    prepare_sets()


# Workdirs


def edit_record(change: Callable[[dict], object]) -> None:
    path = Path("run/config.json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record, indent=2) + "\n")


def forget_data() -> None:
    """Make the workdir one of an older version."""
    edit_record(lambda record: record.pop("data"))


def newest(*, number: int = 0) -> Path:
    steps = sorted(
        (path for path in Path("run/checkpoints").iterdir() if path.name.isdigit()), key=lambda p: -int(p.name)
    )
    return steps[number]


def cut_checkpoint(folder: Path) -> None:
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])


def cut_all_checkpoints() -> None:
    for number in range(2):
        cut_checkpoint(newest(number=number))


def swap_variables() -> None:
    """Put an older checkpoint's network into the newest one: all of it can be read, but does not belong together."""
    shutil.rmtree(newest() / "variables")
    shutil.copytree(newest(number=1) / "variables", newest() / "variables")


def forget_model() -> None:
    Path("run/model.json").unlink()


def replace_log() -> None:
    Path("run/metrics.jsonl").unlink()
    Path("run/metrics.jsonl").mkdir()


def together(*changes: Callable[[], object]) -> Callable[[], None]:
    def make() -> None:
        for change in changes:
            change()

    return make


ACCEPT = ("--changed-data",)
OTHER_EXAMPLES = "does not hold the examples that the run in run was trained on"
OTHER_CLASSES = "are not those that the run in run was trained on"
KITTEN = "missing: 1 (cat), new: 1 (kitten)"
CONTINUES = "continuing after step"
to_kitten = partial(rename_class, "cat", "kitten")

CHANGES = {
    # The same data
    "nothing": Change(CONTINUES, resumes=True),
    "another path": Change(CONTINUES, move_data, ("--data", "elsewhere/animals"), resumes=True),
    "a zip": Change(CONTINUES, partial(pack, "zip"), ("--data", "packed.zip"), resumes=True),
    "a tar": Change(CONTINUES, partial(pack, "tar"), ("--data", "packed.tar"), resumes=True),
    "a link": Change(CONTINUES, lambda: Path("link").symlink_to("pets"), ("--data", "link"), resumes=True),
    "other times": Change(CONTINUES, touch_data, resumes=True),
    "hidden and other files": Change(CONTINUES, hide_files, resumes=True),
    # Nothing is read of the images, so this cannot be noticed: docs/training.md says so.
    "other pixels in a file of the same size": Change(CONTINUES, edit_pixel, resumes=True),
    "records at another path": Change(
        CONTINUES, lambda: Path("sets").rename("moved"), ("--data-dir", "moved"), resumes=True, base="tfds"
    ),
    # Other classes
    "a renamed class": Change(KITTEN, to_kitten),
    "a renamed class that keeps its place": Change(OTHER_CLASSES, partial(rename_class, "cat", "cats")),
    "a class in other letters": Change("missing: 1 (cat), new: 1 (Cat)", partial(rename_class, "cat", "Cat")),
    "two classes that change names": Change(OTHER_EXAMPLES, swap_classes),
    "an added class": Change("new: 1 (fox)", partial(add_class, "fox")),
    "a missing class": Change("missing: 1 (owl)", partial(remove_class, "owl")),
    "a renamed class, changes accepted": Change(KITTEN, to_kitten, ACCEPT),
    "a list with a further class": Change(
        "3 classes without names then, 4 classes without names now",
        lambda: edit_list(lambda lines: [lines[0].replace(" 0", " 3"), *lines[1:]]),
        base="listed",
    ),
    "records of a renamed class": Change(KITTEN, partial(prepare_again, to_kitten), base="tfds"),
    # Other examples
    "an added image": Change("training had 24 images and has 25 now", add_image),
    "an added image, accepted": Change(
        "warning: run continues on other examples than before: training had 24 images and has 25 now",
        add_image,
        ACCEPT,
        resumes=True,
    ),
    "a removed image": Change("training had 24 images and has 23 now", remove_image),
    "an image of another size": Change(
        "with other names, sizes or labels", lambda: picture(Path("pets/train/cat/0.bmp"), 7, side=20)
    ),
    "a renamed image": Change(OTHER_EXAMPLES, lambda: Path("pets/train/cat/0.bmp").rename("pets/train/cat/z.bmp")),
    "an image in another class": Change("training has 24 images as before, but with other names", move_image),
    "an added evaluation image": Change("evaluation had 6 images and has 7 now", partial(add_image, "val")),
    "a removed evaluation image, accepted": Change(
        "evaluation had 6 images and has 5 now", partial(remove_image, "val"), ACCEPT, resumes=True
    ),
    "so little data that the run has ended": Change("it ends after 3", shrink_data, ACCEPT),
    "no data any more": Change("no data at pets", lambda: shutil.rmtree("pets")),
    "labels changed in a list": Change(
        OTHER_EXAMPLES, lambda: edit_list(lambda lines: [lines[0].replace(" 0", " 1"), *lines[1:]]), base="listed"
    ),
    "another order in a list": Change(OTHER_EXAMPLES, lambda: edit_list(lambda lines: lines[::-1]), base="listed"),
    "records of one more image": Change(
        "training had 24 images and has 25 now", partial(prepare_again, add_image), base="tfds"
    ),
    # Settings
    "another learning rate": Change("learning_rate is 0.001 there and 0.5 here", options=("--learning-rate", 0.5)),
    "another split": Change("eval_split is None there and train here", options=("--eval-split", "train")),
    "settings that change no number": Change(CONTINUES, options=("--keep", 5, "--log-every", 2), resumes=True),
    "more epochs of a falling rate": Change(
        "run of 3 epochs, which cannot grow to 4: its linear schedule falls to 0", options=("--epochs", 4)
    ),
    "more epochs of a constant rate": Change(CONTINUES, options=("--epochs", 2), resumes=True, base="constant"),
    "fewer epochs": Change("which cannot shrink to 2", options=("--epochs", 2)),
    "another unit of the length": Change("not in another unit", options=("--steps", 12), base="constant"),
    "more epochs after the statistics": Change(
        "2 steps that re-estimate batch norm's statistics",
        lambda: edit_record(lambda record: record["settings"].update(recalibrate=2)),
        ("--recalibrate", 2, "--epochs", 2),
        base="constant",
    ),
    # Workdirs
    "no fingerprint": Change("warning: an older version wrote run, without a fingerprint", forget_data, resumes=True),
    "no fingerprint and a renamed class": Change(KITTEN, together(forget_data, to_kitten)),
    "no fingerprint and another path": Change(
        "data is pets there", together(forget_data, move_data), ("--data", "elsewhere/animals")
    ),
    "a fingerprint that is none": Change(
        "run/config.json is damaged", lambda: edit_record(lambda record: record["data"].pop("eval"))
    ),
    "a damaged record": Change("run/config.json is damaged", lambda: Path("run/config.json").write_text("{")),
    "an unknown setting": Change(
        "does not know: spline", lambda: edit_record(lambda record: record["settings"].update(spline=3))
    ),
    "no model.json": Change(CONTINUES, forget_model, resumes=True),
    "no model.json and other examples": Change(
        "cannot be read from its model.json", together(forget_model, remove_image)
    ),
    "a damaged newest checkpoint": Change("is damaged", lambda: cut_checkpoint(newest()), resumes=True),
    "a checkpoint with the network of another": Change(
        "its numbers are not those that were saved", swap_variables, resumes=True
    ),
    "damaged checkpoints alone": Change("no checkpoint can be read any more", cut_all_checkpoints),
    "a folder instead of the log": Change("metrics.jsonl", replace_log),
    "another process in the workdir": Change("another process trains in run"),
}


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make_base(name: str, root: Path) -> Path:
    """Train a base in a new folder, and return the folder."""
    words, step = BASES[name]
    (root / name).mkdir(parents=True)
    with in_folder(root / name), pytest.MonkeyPatch.context() as patch:
        write_pets()
        if name == "listed":
            write_listed()
        if name == "tfds":
            prepare_sets()
        if step is not None:
            patch.setattr(loop, "shown", interrupted(loop.shown, step, signal.SIGTERM))
        assert run_command(train.main, [*OPTIONS, *words]) == 0
    return root / name


def contents_of(folder: Path) -> dict[str, bytes | str]:
    """Return {path: what lies there} of a whole folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else "folder" for path in folder.rglob("*")
    }


def assert_handled(name: str, base: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Make a change to a copy of its base, and compare what the same command does with what must happen."""
    change = CHANGES[name]
    shutil.copytree(base, root / "copy", symlinks=True)
    with in_folder(root / "copy"), contextlib.ExitStack() as held:
        change.make()
        if name == "another process in the workdir":
            flock(held.enter_context(open("run/lock")), LOCK_EX)
        before = contents_of(Path("run"))
        capfd.readouterr()
        status = run_command(train.main, [*OPTIONS, *BASES[change.base][0], *map(str, change.options)])
        stderr = capfd.readouterr().err
        assert change.said in stderr, stderr
        if change.resumes:
            assert status == 0 and "error" not in stderr, stderr
            warned = [line for line in stderr.splitlines() if line.startswith("warning: ")]
            # After so few steps a network may well predict one class.
            assert (change.said != CONTINUES) == any("the network predicts" not in line for line in warned), stderr
            assert Path("run/finished").exists()
        else:
            errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
            assert status == 2 and len(errors) == 1 and change.said in errors[0], stderr
            assert contents_of(Path("run")) == before
