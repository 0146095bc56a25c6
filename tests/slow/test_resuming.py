"""All changes to data, settings and workdirs of tests/workdir_changes.py."""

from pathlib import Path

import pytest
import workdir_changes
from share import SHARE
from small_training import few_units

SHOWN = list(workdir_changes.CHANGES)[:: max(1, round(1 / SHARE))]


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    with few_units(stage2=1):
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{name: folder with a training}."""
    root = tmp_path_factory.mktemp("bases")
    return {name: workdir_changes.make_base(name, root) for name in workdir_changes.BASES}


def test_there_are_thirty_changes_or_more() -> None:
    assert len(workdir_changes.CHANGES) >= 30


@pytest.mark.parametrize("name", SHOWN)
def test_a_change_is_refused_and_every_byte_kept_or_the_run_continues(
    name: str,
    bases: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(tmp_path / "cache"))
    workdir_changes.assert_handled(name, bases[workdir_changes.CHANGES[name].base], tmp_path, capfd)
