import dataclasses
import json

import pytest
from conftest import ROOT

from shufflenet_jax import checkpoint
from shufflenet_jax.config import DIGITS_EVAL, ModelInfo
from shufflenet_jax.data.fingerprint import Fingerprint
from shufflenet_jax.errors import InputError
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.training import workdir as workdirs
from shufflenet_jax.training.resuming import Data

CONFIG = PRESETS["digits"]
INFO = ModelInfo(width=0.5, layout="torchvision", num_classes=10, preprocess=DIGITS_EVAL, in_chans=1)
DATA = Data(Fingerprint(1438, "0" * 64), Fingerprint(359, "1" * 64))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a run which has saved a step, by code of some commit; returns what config.json holds."""

    def start(commit="a" * 40, *, data=DATA, accept=False, continues=True, **changes):
        monkeypatch.setattr(workdirs, "commit", lambda: commit)
        run = tmp_path / "run", dataclasses.replace(CONFIG, **changes), INFO, data
        with workdirs.claimed(*run, changed_data=accept):
            if checkpoint.has_steps(run[0]):
                workdirs.record_start(*run, continues=continues)
            (tmp_path / "run/checkpoints/23").mkdir(parents=True, exist_ok=True)
        return json.loads((tmp_path / "run" / workdirs.CONFIG).read_text())

    return start


def test_a_record_names_all_that_decides_the_numbers(start):
    record = start()
    assert record["settings"] == dataclasses.asdict(CONFIG) and record["commit"] == "a" * 40
    assert record["data"]["train"] == {"examples": 1438, "sha256": "0" * 64} and len(record["data"]) == 2
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


def test_a_run_without_a_step_left_keeps_its_record(start, tmp_path):
    first = start()
    (tmp_path / "run" / workdirs.FINISHED).touch()
    assert start(commit="b" * 40, continues=False) == first and (tmp_path / "run" / workdirs.FINISHED).exists()
    assert start(commit="b" * 40) != first and not (tmp_path / "run" / workdirs.FINISHED).exists()


def test_the_data_of_the_last_start_are_those_that_a_run_continues_on(start):
    start()
    other = DATA._replace(eval=Fingerprint(400, "2" * 64))
    with pytest.raises(InputError, match="evaluation had 359 images and has 400 now"):
        start(data=other)
    record = start(data=other, accept=True)
    assert record["data"] == DATA.to_json() and record["resumed"] == [{"data": other.to_json()}]
    assert start(data=other) == record
    with pytest.raises(InputError, match="evaluation had 400 images and has 359 now"):
        start()


DAMAGED = ("", "[]", "{}", '{"settings": 3}', '{"settings": {}, "resumed": [3]}', "3", "null")
NO_DATA = ("3", "{}", '{"train": 3, "eval": 3}', '{"train": {"examples": "a", "sha256": "b"}}')


@pytest.mark.parametrize("text", [*DAMAGED, *(f'{{"settings": {{}}, "data": {data}}}' for data in NO_DATA)])
def test_a_record_that_is_none_gives_one_line(text, start, tmp_path):
    start()
    (tmp_path / "run" / workdirs.CONFIG).write_text(text)
    with pytest.raises(InputError, match="is damaged"):
        start()


def test_the_commit_that_is_recorded_covers_the_whole_package():
    assert (workdirs.PACKAGE / "model.py").is_file() and (workdirs.PACKAGE / "training/workdir.py").is_file()
