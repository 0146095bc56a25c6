"""What README and docs tell people to type."""

import ast
import json
import re
import shutil

import matplotlib.pyplot
import pages
import pytest
from conftest import ROOT
from pages import PAGES, reader, things  # noqa: F401

import shufflenet_jax
from shufflenet_jax.commands.parsing import CommandLine


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
    if words[1:3] == ["-m", "http.server"]:  # Python's own.
        return
    if words[1:3] == ["-m", "pytest"]:
        assert (ROOT / words[-1]).is_file()
        return
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


def test_the_api_reference_has_every_public_name():
    shown = re.findall(r"^::: shufflenet_jax\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(shown) == sorted({*shufflenet_jax.__all__, "load"} - {"__version__"})


def as_option(argument):
    return f"--{argument[1].replace('_', '-')}"


def messages_of_the_package():
    """Yield each text in the package that may be a message, as its parts before, between and behind values."""
    for path in (ROOT / "shufflenet_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "%s" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
                text = node.value.replace("%%", "%")
            else:
                continue
            parts = re.split(r"%(?:s|d|[.0-9]+[fg])", re.sub(r"`(\w+)`", as_option, text))
            if sum(map(len, parts)) >= 15:  # Else it fits too much.
                yield parts


def fits(line, parts):
    """Whether a line ends with these parts; what names the level or the file may stand before them."""
    return all(part in line for part in parts) and re.search(".*".join(map(re.escape, parts)) + "$", line)


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_package():
    blocks = re.findall(r"^```text\n(.*?)^```", (ROOT / "docs/troubleshooting.md").read_text(), re.M | re.S)
    messages = list(messages_of_the_package())
    for line in "".join(blocks).splitlines():
        assert any(fits(line, parts) for parts in messages), line


def test_the_commands_and_the_python_of_the_readme_run_in_their_order(reader, call):  # noqa: F811
    pages.follow(ROOT / "README.md", call)


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
