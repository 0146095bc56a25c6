"""The harness of tests/faults: what it notices, and all that once broke the rule; tests/slow/test_faults.py runs it."""

import os
import resource
import signal

import pytest

from faults import harness
from faults.cases import Case

# What is damaged on purpose is warned of here; the commands run in processes of their own.
pytestmark = pytest.mark.filterwarnings("default")
SEED = 2026
FAILED = {  # what was wrong: (index, kind)
    "model.json: 2 vast": (29, "model used"),
    "dataset_info.json bytes appended": (46, "data used"),
    "line 2: epoch is '1e+308'": (106, "plot"),
    "10.jpg bytes doubled": (145, "data used"),
    "line 11: epoch missing": (159, "plot"),
    "0.jpg is a link to /dev/zero": (168, "images predicted"),
    "line 0: epoch vast": (170, "plot"),
    "to be written to '/x/x/x/x/x/x/x/x/x/x/x/x/x/x/x/x/x/x/x/x'": (176, "bad places"),
    "zip: name 'C:/train/kind0/0.jpg'": (179, "prepare"),
    "to be written to '~nobody-at-all/x'": (244, "bad places"),
    "npz: label vast shape": (291, "compare"),
    "npz: name no array": (358, "compare"),
    "zip: halves exchanged": (362, "prepare"),
    "zip: method": (366, "prepare"),
    "a part zeroed in part": (370, "convert back"),
    "mmpretrain, legacy; net.pth is a pipe": (418, "convert"),
    "zip: lying": (448, "prepare"),
    "_METADATA is a pipe": (497, "convert back"),
    "to be written to '/loop'": (596, "bad places"),
    "megvii-stages, zip; tensors: vast classifier": (718, "convert"),
    "tar: halves exchanged": (776, "prepare"),
    "npz: name records": (1038, "compare"),
    "0.png: image: a line": (1093, "data used"),
    "zip: name 'train//0.jpg'": (1172, "prepare"),
    "mmpretrain, legacy; net.pth bits flipped": (1834, "torch file used"),
    "dataset_info.json is a pipe": (2505, "data used"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with harness.Run(tmp_path_factory.mktemp("faults") / "run", SEED) as run:
        yield run
        assert run.originals.unchanged()


GOOD = harness.Answer(0, "result", "", 1.0, 1 << 30)
REFUSED = harness.Answer(2, "", "error: the file is damaged; fetch it again\n", 1.0, 1 << 30)
BEFORE = {"in/file": "hash", "out": "folder"}


@pytest.mark.parametrize(
    ("answer", "after", "told"),
    [
        (GOOD._replace(status=None), {}, "it hangs"),
        (GOOD._replace(status=-11), {}, "status -11"),
        (GOOD._replace(status=1), {}, "status 1"),
        (GOOD._replace(stderr="Traceback (most recent call last):\nValueError"), {}, "a traceback"),
        (GOOD._replace(stderr="libpng warning: bad"), {}, "other words"),
        (GOOD._replace(stderr="error: no"), {}, "an error, but status 0"),
        (GOOD._replace(peak=5 << 30), {}, "5120 MiB"),
        (GOOD, {"cwd/new": "hash"}, "outside the output folder: ['cwd/new']"),
        (GOOD, {"in/file": "another"}, "outside the output folder: ['in/file']"),
        (REFUSED._replace(stderr=""), {}, "0 error lines"),
        (REFUSED._replace(stderr="error: one\nerror: two\n"), {}, "2 error lines"),
        (REFUSED, {"out/.model.x/model": "folder"}, "left behind: ['out/.model.x/model']"),
    ],
)
def test_the_rule_notices(answer, after, told):
    (fault,) = harness.faults_of(Case(["info"], "damaged"), answer, BEFORE, BEFORE | after)
    assert told in fault


def test_the_rule_lets_right_answers_pass():
    case = Case(["info"], "damaged", may_change=("kept.*",))
    assert not harness.faults_of(case, GOOD, BEFORE, BEFORE | {"out/model": "hash"})
    assert not harness.faults_of(case, REFUSED, BEFORE, BEFORE | {"out/kept/part": "hash"})


def test_a_worker_that_hangs_or_is_killed_is_named_and_replaced(tmp_path):
    with harness.Worker(tmp_path / "worker") as worker:
        assert worker(["models"], tmp_path).status == 0
        assert resource.prlimit(worker.pid, resource.RLIMIT_DATA) == (harness.MEMORY, harness.MEMORY)
        worker.seconds = 0.01
        late = worker(["prepare", "--source", str(tmp_path), "--name", "x", "--out", str(tmp_path)], tmp_path)
        assert late.status is None and "most recent call first" in late.stderr
        worker.seconds = harness.SECONDS
        again = worker(["models"], tmp_path)
        assert again.status == 0 and 50 << 20 < again.peak < harness.MEMORY
        os.kill(worker.pid, signal.SIGSEGV)
        assert worker(["models"], tmp_path).status == -signal.SIGSEGV


@pytest.mark.parametrize("told", FAILED)
def test_what_once_broke_the_rule_keeps_it(told, run):
    finding = run.finding(*FAILED[told])
    assert finding.told == told, "the harness draws something else for this seed now; look for another one"
    assert not finding.faults, str(finding)
