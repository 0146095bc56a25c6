"""The rules of docs/architecture.md: one-way imports, what may import what, and short functions."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter

import numpy as np
import pytest
from conftest import ROOT

PACKAGE = ROOT / "shufflenet_jax"
HEAVY = {"cv2", "PIL", "simplejpeg", "torch", "tensorflow_datasets", "orbax", "matplotlib"}


@cache
def modules():
    """{dotted name: syntax tree} of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imports_of(name):
    """The modules that a module imports anywhere, also inside functions; those of the package by their whole names."""
    path = PACKAGE.parent / name.replace(".", "/")
    package = name.split(".") if path.is_dir() else name.split(".")[:-1]
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if whole in modules() else module


def own_imports(name):
    return {module for module in imports_of(name) if module in modules()} - {name}


def test_imports_form_no_cycle():
    # The package itself looks its public names up when they are asked for.
    graph = {name: own_imports(name) for name in modules() if name != "shufflenet_jax"}
    TopologicalSorter(graph).prepare()  # Raises CycleError.
    assert len(graph) > 50


def test_the_library_imports_no_command_and_parses_no_command_line():
    for name in modules():
        if name == "shufflenet_jax.__main__" or name.startswith("shufflenet_jax.commands"):
            continue
        found = set(imports_of(name))
        assert not {module for module in found if module.startswith("shufflenet_jax.commands")}, name
        assert not found & {"argparse", "simple_parsing", "tqdm"}, name


@pytest.mark.parametrize(
    ("library", "place"), [("orbax", "checkpoint"), ("tqdm", "commands.console"), ("jax.distributed", "parallel")]
)
def test_one_module_alone_knows_a_library(library, place):
    users = {
        name
        for name, tree in modules().items()
        if re.search(rf"\b{re.escape(library)}\b", re.sub(r'"""[\s\S]*?"""|#.*', "", ast.unparse(tree)))
        and any(module.split(".")[0] == library.split(".")[0] for module in imports_of(name))
    }
    assert users == {f"shufflenet_jax.{place}"}


def test_the_library_names_no_option_of_a_command():
    for name, tree in modules().items():
        if name == "shufflenet_jax.__main__" or name.startswith("shufflenet_jax.commands"):
            continue
        raised = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in raised:
            called = ast.unparse(call.func)
            if called == "InputError" or called.startswith("logger."):
                assert not re.search(r"(?<![\w-])--[a-z]", ast.unparse(call)), (name, ast.unparse(call))


def test_the_training_step_needs_no_image_library_and_no_checkpoint_library():
    script = "import sys; import shufflenet_jax.training.step; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
    assert "jax" in done.stdout.split()


def test_functions_stay_short():
    lengths = []
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = node.body[0] if ast.get_docstring(node) else None
                text = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                lengths.append(node.end_lineno - node.lineno + 1 - text)
    assert np.median(lengths) <= 7
    assert np.percentile(lengths, 90) <= 22
    assert max(lengths) <= 70
