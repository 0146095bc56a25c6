"""A training that loses one of its hosts."""

import signal
import time

from share import in_full
from small_training import interrupted
from test_hosts import RUN, alone, assert_same_run, end, start_two  # noqa: F401

from shufflenet_jax.commands import train
from shufflenet_jax.training import loop


@in_full
def test_a_run_goes_on_in_two_processes_and_after_one_of_them_was_killed(alone, tmp_path, monkeypatch, call):  # noqa: F811
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "shown", interrupted(loop.shown, 6, signal.SIGTERM))
        status, _, stderr = call(train.main, *RUN, "--workdir", workdir)
    assert status == 0 and "stopped after step 7, which is saved" in stderr
    began = time.monotonic()
    (status, _, stderr), (killed, _, _) = end(start_two(workdir, at=((), ("--at", "10", "SIGKILL"))))
    assert killed == -signal.SIGKILL and status not in (0, killed) and time.monotonic() - began < 120
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "continuing after step 7" in stderr and len(errors) == 1 and "its output says why" in errors[0]
    status, _, stderr = call(train.main, *RUN, "--workdir", workdir)
    assert status == 0 and "continuing after step 7" in stderr
    assert_same_run(workdir, alone)
