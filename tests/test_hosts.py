"""Trainings by several processes on this machine, which find each other at 127.0.0.1."""

import json
import os
import socket
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from conftest import ROOT, figures_of
from small_training import TINY_TABLE

from shufflenet_jax import checkpoint, parallel
from shufflenet_jax.commands import evaluate, train

# In float64, with a small learning rate lest the network amplify rounding, over two uneven last batches.
RUN = (
    *("--config", "digits", "--image-size", "8", "--epochs", "2", "--eval-every", "1", "--log-every", "5"),
    *("--dtype", "float64", "--learning-rate", "1e-4", "--bn-group-size", "16", "--ema-decay", "0.9", "--keep", "5"),
    *("--batch-size", "128", "--lowering", "reference", *TINY_TABLE),  # Few steps, compiled sooner.
)
LAST = 24


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a run on the 4 devices of this process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert train.main([*RUN, "--workdir", str(workdir)]) == 0
    return workdir


def start(
    workdir,
    *,
    devices,
    process=0,
    processes=1,
    port=None,
    at=(),
    options=RUN,
    environment=None,
    by_environment=False,
):
    """A process of a run; it learns of the others by options or by environment variables."""
    argv = [sys.executable, ROOT / "tests/small_training.py", *at, *options]
    argv += ["--checkpoint" if "eval" in at else "--workdir", workdir]
    environment = dict(environment or {})
    if processes > 1:
        where = {"coordinator-address": f"127.0.0.1:{port}", "num-processes": processes, "process-id": process}
        for name, value in where.items():
            if by_environment:
                environment[f"JAX_{name.replace('-', '_').upper()}"] = str(value)
            else:
                argv += [f"--{name}", value]
    return subprocess.Popen(
        list(map(str, argv)),
        env={**os.environ, **environment, "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(workdir, *, at=((), ()), options=RUN, by_environment=False):
    """Two processes of a run with 2 devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"devices": 2, "processes": 2, "port": port, "options": options, "by_environment": by_environment}
    return [start(workdir, process=i, at=at[i], **common) for i in range(2)]


def end(processes):
    """(exit status, stdout, stderr) of each."""
    told = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, told, strict=True)]


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(ours, theirs):
    """The same evaluations, and the same state to 1e-7 of the largest entry: sums have another order, in float64."""
    evaluations = [[row for row in rows_of(workdir) if row["split"] != "train"] for workdir in (ours, theirs)]
    for our, their in zip(*evaluations, strict=True):
        assert our == {**their, "loss": pytest.approx(their["loss"], rel=1e-7)}
    for name in (checkpoint.VARIABLES, checkpoint.OPTIMIZER, checkpoint.EMA):
        found, expected = (dict(leaves_of(workdir / f"checkpoints/{LAST}/{name}")) for workdir in (ours, theirs))
        assert found.keys() == expected.keys()
        largest = max(np.abs(leaf).max() for leaf in expected.values())
        for path, leaf in expected.items():
            assert np.abs(found[path] - leaf).max() <= 1e-7 * largest, path


def leaves_of(folder):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")  # The devices of the run do not matter here.
        for path, leaf in jax.tree.leaves_with_path(checkpointer.restore(folder)):
            yield jax.tree_util.keystr(path), np.asarray(leaf)


def test_two_processes_with_two_devices_each_train_as_one_with_four_and_one_with_one_goes_on(alone, tmp_path):
    """They meet by environment variables alone. A scheduler stops one in the second epoch, and both save."""
    ended = end(start_two(tmp_path / "run", at=((), ("--at", "16", "SIGTERM")), by_environment=True))
    (status, out, told), (other_status, other_out, other_told) = ended
    assert status == other_status == 0, told + other_told
    assert "2 process(es) with 2 device(s) each" in told and "on 4 device(s)" in told and "top-1" in told
    assert "top-1" not in other_told and "error" not in other_told, "one process tells how it goes"
    # Each makes sure that its devices agree to the bit, and so must the processes.
    states, others = ([line for line in words.splitlines() if "state" in line] for words in (out, other_out))
    assert len(states) == 2 and states == others
    stopped = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit())
    assert 16 < stopped < LAST and f"stopped after step {stopped}, which is saved" in told

    ((status, _, told),) = end([start(tmp_path / "run", devices=1)])
    assert status == 0 and f"continuing after step {stopped}" in told and "on 1 device(s)" in told
    assert_same_run(tmp_path / "run", alone)


def test_two_processes_evaluate_as_one(alone, call):
    """359 images in batches of 16 leave the last one uneven."""
    (status, out, told), (other_status, other_out, _) = end(
        start_two(alone, at=(("eval",), ("eval",)), options=("--data", "digits"))
    )
    assert status == other_status == 0, told
    assert "{" not in other_out, "one process tells the figures"
    _, expected, _ = call(evaluate.main, "--checkpoint", alone, "--data", "digits")
    found, expected = figures_of(out), figures_of(expected)
    assert found == {**expected, "loss": pytest.approx(expected["loss"], abs=2e-6)}


def test_tasks_of_slurm_find_each_other_and_are_told_of_different_settings(tmp_path):
    """JAX makes the port of the number of the job."""
    job = next(number for number in range(os.getpid(), os.getpid() + 4096) if is_free(number % 4096 + 61440))
    tasks = []
    for task in range(2):
        environment = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": task, "LOCALID": task}
        slurm = {f"SLURM_{name}": str(value) for name, value in environment.items()}
        tasks.append(start(tmp_path / "run", devices=1, options=(*RUN, "--seed", task), environment=slurm))
    for status, _, told in end(tasks):
        assert status == 2 and "error: processes differ in their settings: 0 from 1" in told


def is_free(port):
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((None, 2, 0), "give all three"),
        (("here:1", 2, 2), "counts from 0"),
        (("here", 2, 0), "is HOST:PORT"),
    ],
)
def test_how_processes_meet_is_checked(given, told):
    with pytest.raises(ValueError, match=told), parallel.joined(*given):
        pass


def test_processes_meet_by_themselves_only_where_the_surroundings_tell_of_others(monkeypatch):
    met = []
    monkeypatch.setattr(parallel, "_meet", lambda *given: met.append(given))
    for environment, several in (
        ({}, False),
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "1.2.3.4"}, False),
        ({"KUBERNETES_SERVICE_HOST": "1.2.3.4", "JOB_COMPLETION_INDEX": "0"}, True),
    ):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            met.clear()
            with parallel.joined():
                assert met == [(None, None, None)] * several, environment


def test_environment_variables_are_the_defaults_of_the_options(monkeypatch, refused):
    names = ("coordinator_address", "num_processes", "process_id")
    for name, value in zip(names, ("a:1", "4", "3"), strict=True):
        monkeypatch.setenv(f"JAX_{name.upper()}", value)
    options = train.parse(["--config", "digits", "--process-id", "2"])[1]
    assert [getattr(options, name) for name in names] == ["a:1", 4, 2], "an option counts more"
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    assert "give all three, here or as JAX_COORDINATOR_ADDRESS" in refused(train.main, "--config", "digits")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    assert "JAX_NUM_PROCESSES is 'many', but must be" in refused(train.main, "--config", "digits")
