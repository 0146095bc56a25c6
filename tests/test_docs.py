"""What README and docs tell people to type."""

import json
import os
import re
import shutil
import subprocess
import sys

import matplotlib.pyplot
import pages
import pytest
from conftest import ROOT
from pages import PAGES
from small_training import few_units

from shufflenet_jax import config, model, ops
from shufflenet_jax.cli import CommandLine
from shufflenet_jax.porting import dialects

# The commands keep their words; these behind them make them short.
SHORTER = {
    "train": "--steps 2 --batch-size 8 --eval-batch-size 8 --image-size 32 --eval-every 100".split(),
    "eval": ["--limit", "2"],
}
SMALLER = {'"train": 100, "val": 50': '"train": 4, "val": 2', "range(5)": "range(2)"}  # In Python.


def commands():
    for page in PAGES:
        for step in pages.steps(page):
            if step.kind != "python" and step.words[:1] == ["python"]:
                yield pytest.param(step.words, id=f"{page.stem}: {' '.join(step.words[1:])[:60]}")


class Accepted(Exception):
    pass


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_is_accepted_by_its_parser(words, monkeypatch):
    usual = CommandLine.parse_args

    def parse_args(self, *given):
        parsed = usual(self, *given)
        if self.prog != "shufflenet-jax":  # Which only finds the command.
            raise Accepted
        return parsed

    monkeypatch.setattr(CommandLine, "parse_args", parse_args)
    # Words in capitals stand for people's own.
    words = ["3" if word in ("N", "I") else word for word in words if word not in ("COMMAND", "OPTIONS")]
    command = pages.command_of(words)
    if command is None:  # A benchmark, or what draws the demo.
        text = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--"))
        return
    main, argv = command
    with pytest.raises((Accepted, SystemExit)):  # The latter after --help.
        main(argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    root = tmp_path_factory.mktemp("things")
    pages.save_readers_things(root)
    return root


@pytest.fixture
def reader(things, tmp_path, monkeypatch, call):
    """In a folder with all that the pages speak of; networks have few units, and published ones can be had."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "home/tensorflow_datasets"))
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "demo", tmp_path / "demo")
    pages.publish(things, monkeypatch)
    matplotlib.use("Agg")
    tables = (model.CHANNELS, config.PREPROCESSING, ops.MODULES, dialects.DIALECTS)  # What extending.md adds to.
    kept = [dict(table) for table in tables]
    for place, name in ((config, "WIDTHS"), (ops, "LOWERINGS")):
        monkeypatch.setattr(place, name, getattr(place, name))
    with few_units():
        yield
    for table, usual in zip(tables, kept, strict=True):
        table.clear()
        table.update(usual)


def run_command(step, call):
    """Runs a command line in this process; one with variables or & as a process of its own, which is returned."""
    words = step.words
    main, argv = pages.command_of(words)
    name = words[3] if words[1] == "-m" else words[1].removesuffix(".py")
    shorter = SHORTER.get(name, [])
    if step.variables or step.text.rstrip().endswith("&"):
        script = [sys.executable, str(ROOT / "tests/small_training.py")]
        return subprocess.Popen([*script, *argv, *shorter], env={**os.environ, **step.variables})
    status, _, stderr = call(main, *argv, *shorter)
    missed = status == 1 and "--expect-top1" in words  # Random weights miss what is published.
    assert status == 0 or missed, f"{step.text}\n{stderr}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_and_the_python_of_a_page_run_in_their_order(page, reader, call):
    names, processes = {}, []
    for step in pages.steps(page):
        if step.kind == "python":
            text = step.text
            for usual, smaller in SMALLER.items():
                text = text.replace(usual, smaller)
            exec(text, names)
        elif step.kind == "sh" and not step.needs and not step.is_benchmark:
            processes.append(run_command(step, call))
    assert all(process.wait() == 0 for process in processes if process)
    matplotlib.pyplot.close("all")


@pytest.mark.real_data
def test_the_notebook_gives_what_it_shows(card_at_hand, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "demo", tmp_path / "demo")
    matplotlib.use("Agg")
    cells = json.loads((ROOT / "examples/quickstart.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            capsys.readouterr()
            exec("".join(cell["source"]), names)
            shown = [output for output in cell["outputs"] if output["output_type"] == "stream"]
            assert capsys.readouterr().out == "".join("".join(output["text"]) for output in shown)
    assert [panel.get_title() for panel in names["panels"]] == ["flamingo", "wall clock", "traffic light"]
    matplotlib.pyplot.close("all")
