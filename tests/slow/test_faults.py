"""Damaged inputs of every kind: each gives a right result or one `error:` line and status 2; see tests/faults."""

import os

import pytest
from faults import harness
from share import SHARE

from shufflenet_jax.data.workers import usable_cores

SEED = int(os.environ.get("SEED", "2026"))
# What is damaged on purpose is warned of here; the commands run in processes of their own.
pytestmark = pytest.mark.filterwarnings("default")
CASES, PROCESSES = max(1, round(2000 * SHARE)), max(1, round(50 * SHARE))


@pytest.mark.skipif("CASE" in os.environ, reason="one case runs alone")
def test_no_damaged_input_breaks_the_rule(tmp_path, capsys):
    findings = []
    with harness.Run(tmp_path / "run", SEED, workers=usable_cores()) as run:
        findings += run.findings(range(CASES))
        findings += run.findings_in_processes(range(CASES, CASES + PROCESSES))
        assert run.originals.unchanged(), "a command changed an input that it was given unharmed"
    broken = [finding for finding in findings if finding.faults]
    slowest, largest = (max(getattr(f.answer, name) for f in findings) for name in ("seconds", "peak"))
    with capsys.disabled():
        print(
            f"\n{CASES} mutated inputs and {PROCESSES} processes with seed {SEED}: {len(broken)} violations; "
            f"at most {slowest:.1f} s and {largest >> 20} MiB"
        )
    assert not broken, "\n\n".join(map(str, broken))


@pytest.mark.skipif("CASE" not in os.environ, reason="CASE names one case that is to be run again")
def test_the_case_that_is_named_keeps_the_rule(tmp_path, capsys):
    with harness.Run(tmp_path / "run", SEED) as run:
        finding = run.finding(int(os.environ["CASE"]))
    with capsys.disabled():
        shown = f"\n{finding}\n{finding.answer.stdout}{finding.answer.stderr}status {finding.answer.status}"
        print(shown.encode(errors="backslashreplace").decode())  # Arguments may be no text.
    assert not finding.faults
