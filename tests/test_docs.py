"""What README and docs tell people to type."""

import json
import re
import shlex
import shutil

import matplotlib.pyplot
import pytest
from conftest import ROOT

from shufflenet_jax import __main__
from shufflenet_jax.cli import CommandLine
from shufflenet_jax.commands import evaluate, from_torch, to_torch, train

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "train.py": train.main,
    "eval.py": evaluate.main,
    "convert/from_torch.py": from_torch.main,
    "convert/to_torch.py": to_torch.main,
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands():
    """(page, words) of each line of a shell block that starts Python, and of those in tables and sentences."""
    for page in PAGES:
        lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(python [^`]*?\.py[^`]*|python -m shufflenet_jax [^`]*)`", page.read_text())
        for line in lines:
            words = shlex.split(line.rstrip("& ").replace("\n", " "), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words[:1] == ["python"] and words[1:2] != ["-c"]:
                yield pytest.param(words[1:], id=f"{page.stem}: {' '.join(words[1:])[:60]}")


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
    if words[0] == "-m" and words[1] == "shufflenet_jax":
        main, argv = __main__.main, words[2:]
    elif words[0] in SCRIPTS:
        main, argv = SCRIPTS[words[0]], words[1:]
    else:  # A benchmark, or what draws the demo.
        text = (ROOT / words[0]).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--"))
        return
    with pytest.raises((Accepted, SystemExit)):  # The latter after --help.
        main(argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.fixture
def reader(card_at_hand, tmp_path, monkeypatch):
    """In a folder with the demo's pictures, where the card's weights can be had."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "demo", tmp_path / "demo")
    return card_at_hand


@pytest.mark.real_data
def test_the_readmes_python_runs_as_it_stands(reader, call):
    assert call(from_torch.main, reader, "--out", "x1_0", "--no-verify")[0] == 0
    names = {}
    for block in blocks(ROOT / "README.md", "python"):
        # torchvision's own 0.5x weights are not at hand.
        exec(block.replace('"shufflenet_v2_x0_5", pretrained=True', '"shufflenet_v2_x0_5"'), names)
    assert names["result"]["pred_class"] == "flamingo" and names["small"].info.num_classes == 10
    assert names["features"]["pooled"].shape == (1, 1024)


@pytest.mark.real_data
def test_the_notebook_gives_what_it_shows(reader, capsys):
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
