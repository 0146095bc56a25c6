import dataclasses
import json

import pytest
from conftest import ROOT

from shufflenet_jax.config import DIGITS_EVAL, ModelInfo
from shufflenet_jax.errors import InputError
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.training import workdir as workdirs

CONFIG = PRESETS["digits"]
INFO = ModelInfo(width=0.5, layout="torchvision", num_classes=10, preprocess=DIGITS_EVAL, in_chans=1)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a run which has saved a step, by code of some commit; returns what config.json holds."""

    def start(commit="a" * 40, **changes):
        monkeypatch.setattr(workdirs, "commit", lambda: commit)
        with workdirs.claimed(tmp_path / "run", dataclasses.replace(CONFIG, **changes), INFO):
            (tmp_path / "run/checkpoints/23").mkdir(parents=True, exist_ok=True)
        return json.loads((tmp_path / "run" / workdirs.CONFIG).read_text())

    return start


def test_a_record_names_all_that_decides_the_numbers(start):
    record = start()
    assert record["settings"] == dataclasses.asdict(CONFIG) and record["commit"] == "a" * 40
    required = {line.split(">")[0].split("=")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert {"python", "jax", "pillow", "opencv-python-headless", "simplejpeg"} <= record["versions"].keys()
    assert record["versions"].keys() - {"python", "jaxlib", "shufflenet_jax"} <= required


def test_going_on_keeps_how_a_run_began_and_tells_what_is_other_since(start, monkeypatch):
    first = start()
    assert start() == first
    second = start(commit="b" * 40)
    assert second == {**first, "resumed": [{"commit": "b" * 40}]}
    assert start(commit="b" * 40) == second
    third = start(commit="b" * 40, keep=5)
    assert third["resumed"] == [{"commit": "b" * 40}, {"settings": {"keep": 5}}]
    monkeypatch.setattr(workdirs, "version", lambda name: "9.9")
    fourth = start(commit="a" * 40)
    assert fourth["resumed"][2].keys() == {"settings", "versions", "commit"}
    assert {key: fourth[key] for key in first} == first


def test_a_finished_run_keeps_its_record(start, tmp_path):
    first = start()
    (tmp_path / "run" / workdirs.FINISHED).touch()
    assert start(commit="b" * 40) == first


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 3}', '{"settings": {}, "resumed": [3]}', "3", "null"])
def test_a_record_that_is_none_gives_one_line(text, start, tmp_path):
    start()
    (tmp_path / "run" / workdirs.CONFIG).write_text(text)
    with pytest.raises(InputError, match="is damaged"):
        start()


def test_the_commit_that_is_recorded_covers_the_whole_package():
    assert (workdirs.PACKAGE / "model.py").is_file() and (workdirs.PACKAGE / "training/workdir.py").is_file()
