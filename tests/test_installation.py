"""What is installed: the lists of packages agree, the core works without the extras, and commands say what they are."""

import json
import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from PIL import Image

import shufflenet_jax as snet
from shufflenet_jax.__main__ import COMMANDS, main
from shufflenet_jax.errors import InputError
from shufflenet_jax.installation import EXTRAS
from shufflenet_jax.recipes import PRESETS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = {"train": "train.py", "eval": "eval.py", "convert": "convert/from_torch.py"}
SCRIPTS["convert-back"] = "convert/to_torch.py"
NAME = "shufflenet_v2_x0_5"
# Runs command lines as where only the core is installed: the packages of all extras are out of reach.
CORE_ALONE = """
import contextlib, importlib.machinery, io, json, sys
class Core(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        missing = name in {"torch", "onnx", "onnxruntime", "huggingface_hub"}
        return None if missing else super().find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Core
from shufflenet_jax.__main__ import main
from shufflenet_jax.commands.console import run
results = {}
for line in json.load(sys.stdin):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            status = run(main, line.split())
        except SystemExit as end:
            status = end.code
    results[line] = status, stdout.getvalue(), stderr.getvalue()
print(json.dumps(results))
"""
TRAIN = (
    "train --config cifar10 --data data --workdir run --channels 8,16,16,16,32 --repeats 2,1,1 --steps 2 "
    "--batch-size 4 --image-size 32 --bn-group-size 0 --warmup-steps 0"
)
WORKING = {  # line: what its stdout holds
    TRAIN: "",
    "eval --checkpoint run --data data --report report.html": '"images": 4',
    "predict data/val/ants/0.png --checkpoint run --topk 1": "%",
    "predict data/val --checkpoint run --features features.npz": "",
    "export run --format stablehlo --out run.stablehlo": "wrote run.stablehlo",
    "export run --format safetensors --out run.safetensors": "wrote run.safetensors",
    "publish run --out given --name net --licence CC0-1.0": "given/net-",
    "info --checkpoint run --json": '"num_classes": 2',
    "info --compare 8,16,16,16,32/2,1,1 --resolution 32x32": "8,16,16,16,32/2,1,1",
    "models": NAME,
    "verify data": '"images": 4',
    "prepare --source data --name mine --out sets --processes 1": '"val": 4',
    "plot run": "curves.png",
    "convert --help": "--small-stem",
    "convert-back --help": "--dialect",
}
MISSING = {  # line: (package, extra)
    "convert net.pth --out new": ("torch", "torch"),
    "convert-back run --dialect torchvision --out new": ("torch", "torch"),
    "eval --checkpoint net.pth --data data": ("torch", "torch"),
    f"predict data/val/ants/0.png --checkpoint {NAME}": ("torch", "torch"),
    "train --config cifar10 --data data --init-from net.pth --workdir new": ("torch", "torch"),
    "export run --format torchvision --out new": ("torch", "torch"),
    "export run --format onnx --out new": ("onnx", "export"),
    "info --checkpoint hf-hub:me/net": ("huggingface_hub", "hub"),
    "publish run --out new --name net --licence MIT --push hf-hub:me/net": ("huggingface_hub", "hub"),
}


def run_process(*argv, cwd=ROOT, **options):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, **options)


# Lists of packages


def requirements_of(lines):
    """{name: Requirement} of lines as pip reads them."""
    stated = [Requirement(line) for line in (line.partition("#")[0].strip() for line in lines) if line]
    return {requirement.name.lower(): requirement for requirement in stated}


def test_pyproject_and_requirements_list_the_same_packages_in_the_same_ranges():
    listed = requirements_of((ROOT / "requirements.txt").read_text().splitlines())
    extras = PROJECT["optional-dependencies"]
    stated = requirements_of([*PROJECT["dependencies"], *(line for name in EXTRAS for line in extras[name])])
    exact, ranged = listed.pop("torch"), stated.pop("torch")
    assert str(exact) == "torch==2.13.0" and ranged.specifier.contains("2.13.0")
    assert listed == stated
    assert not {name for packages in EXTRAS.values() for name in packages} & {
        name.replace("-", "_") for name in requirements_of(PROJECT["dependencies"])
    }


def test_the_extras_are_those_that_a_missing_package_is_looked_up_in():
    extras = dict(PROJECT["optional-dependencies"])
    assert extras.pop("all") == [f"shufflenet_jax[{','.join(EXTRAS)}]"]
    modules = {extra: tuple(name.replace("-", "_") for name in requirements_of(extras[extra])) for extra in extras}
    assert modules == EXTRAS


@pytest.mark.parametrize("name", ["3.11", "newest"])
def test_constraints_pin_each_package_of_an_environment_within_its_range(name):
    pinned = requirements_of((ROOT / f"constraints-{name}.txt").read_text().splitlines())
    required = requirements_of([*PROJECT["dependencies"], *(ROOT / "tests/requirements.txt").read_text().splitlines()])
    if name == "3.11":
        required |= requirements_of((ROOT / "requirements.txt").read_text().splitlines())
    spelled = {re.sub("[-_.]+", "-", name): requirement for name, requirement in pinned.items()}
    for package, requirement in required.items():
        (exact,) = spelled[re.sub("[-_.]+", "-", package)].specifier
        assert exact.operator == "==" and requirement.specifier.contains(exact.version), package


def test_all_python_files_and_data_are_part_of_the_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "shufflenet_jax").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(listed)


# The core alone


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """{line: (status, stdout, stderr)} of the commands, and the folder in which they ran."""
    root = tmp_path_factory.mktemp("core")
    rng = np.random.default_rng(0)
    for split, count in {"train": 4, "val": 2}.items():
        for name in ("ants", "bees"):
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "data" / split / name / f"{i}.png")
    (root / "net.pth").write_bytes(b"never read")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHUFFLENET_JAX_CACHE": str(root / "cache")}
    lines = json.dumps([*WORKING, *MISSING])
    done = run_process("-c", CORE_ALONE, cwd=root, env=environment, input=lines, check=True)
    return json.loads(done.stdout.splitlines()[-1]), root


@pytest.mark.parametrize("line", WORKING, ids=lambda line: line.partition(" ")[0])
def test_the_core_alone_is_enough(core, line):
    status, stdout, stderr = core[0][line]
    assert status in (0, None) and WORKING[line] in stdout, stderr


@pytest.mark.parametrize("line", MISSING)
def test_a_missing_extra_is_one_line_and_nothing_is_written(core, line):
    package, extra = MISSING[line]
    message = f"error: the package {package} is missing; run pip install 'shufflenet_jax[{extra}]'\n"
    assert core[0][line] == [2, "", message]
    assert not (core[1] / "new").exists() and not (core[1] / "cache/downloads").exists()


def test_windows_is_one_line():
    code = "import sys; sys.platform, sys.modules['fcntl'] = 'win32', None\n"
    done = run_process("-c", f"{code}from shufflenet_jax.__main__ import entry; sys.exit(entry('models'))")
    assert (done.returncode, done.stdout) == (2, "")
    message = "Windows is not supported; use the Windows Subsystem for Linux (WSL)"
    assert done.stderr == f"error: {message}\n"
    done = run_process("-c", f"{code}import shufflenet_jax\nshufflenet_jax.get_model('{NAME}')")
    assert done.stderr.splitlines()[-1].endswith(
        "InputError: Windows is not supported; use the Windows Subsystem for Linux (WSL)"
    )


# What commands and objects say they are


def test_the_package_lists_its_names():
    assert set(snet.__all__) <= set(dir(snet)) and "__version__" in snet.__all__
    assert PROJECT["dynamic"] == ["version"]
    assert f"version: {snet.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_each_command_tells_the_version(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([*([name] if name else []), "--version"])
    assert not end.value.code and capsys.readouterr().out == f"shufflenet_jax {snet.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command_that_was_typed(name, capsys, monkeypatch):
    typed = {
        "/bin/shufflenet-jax": f"shufflenet-jax {name}",
        "shufflenet_jax/__main__.py": f"python -m shufflenet_jax {name}",
        **({SCRIPTS[name]: SCRIPTS[name].rpartition("/")[2]} if name in SCRIPTS else {}),
    }
    for path, expected in typed.items():
        monkeypatch.setattr("sys.argv", [path])
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {expected} ")
        with pytest.raises(InputError, match=rf"see {expected} --help"):
            main([name, "--no-such-option"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["-m", "shufflenet_jax", "plot"], "python -m shufflenet_jax plot"), (["eval.py"], "eval.py")],
)
def test_a_process_names_what_was_typed(argv, expected):
    assert f"see {expected} --help" in run_process(*argv, "--no-such-option").stderr


def test_a_model_says_what_it_is():
    assert repr(snet.get_model(NAME, num_classes=7)) == (
        "<Model: ShuffleNetV2 0.5x, torchvision layout, 7 classes, for images of 224 x 224 x 3>"
    )
    own = snet.get_model(NAME, channels=[8, 16, 16, 16, 32], repeats=np.array([2, 1, 1]), in_chans=1)
    assert repr(own) == (
        "<Model: ShuffleNetV2 8,16,16,16,32/2,1,1, torchvision layout, 1000 classes, for images of 224 x 224 x 1>"
    )
    assert snet.get_model(NAME, num_classes=np.int64(3)).info.num_classes == 3
    assert own.info.table == own.module.table == ((8, 16, 16, 16, 32), (2, 1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": "a"}, "width is 'a', but must be one of 0.5, 1.0, 1.5, 2.0"),
        ({"width": [1.0]}, r"width is \[1.0\]"),
        ({"width": True}, "width is True"),
        ({"channels": 24}, "channels is 24, but must be a sequence of whole numbers"),
        ({"channels": "24,48,96,192,192"}, "channels is '24,48,96,192,192', but must be a sequence"),
        ({"channels": (24.0, 48.0, 96.0, 192.0, 192.0)}, r"channels is \(24.0, .*, but must be a sequence of whole"),
        ({"channels": [24, 49, 96, 192, 192]}, "^stage2 has 49 channels, an odd number"),
        ({"channels": (24, 48, 96)}, "^channels has 3 numbers, but must have 5"),
        ({"repeats": 4}, "repeats is 4, but must be a sequence of whole numbers"),
        ({"repeats": {"stage2": 4}}, "repeats is .*, but must be a sequence of whole numbers"),
        ({"frozen": "conv1"}, "frozen is 'conv1', but must be a tuple of some of conv1, stage2"),
        ({"frozen": ("stage1",)}, r"frozen is \('stage1',\)"),
        ({"layout": 3}, "layout is 3, but must be one of torchvision, megvii"),
        ({"lowering": "fast"}, "lowering is 'fast', but must be one of auto, cpu, gpu, reference"),
        ({"small_stem": "yes"}, "small_stem is 'yes', but must be one of False, True"),
        ({"dropout": "0.2"}, r"dropout is '0.2', but must be in \[0, 1\)"),
        ({"dtype": "float23"}, "dtype is 'float23', but must be a type of floats"),
        ({"dtype": "int32"}, "dtype is 'int32', but must be a type of floats"),
        ({"num_classes": "ten"}, "num_classes is 'ten', but must be 0 or more, a whole number"),
        ({"num_classes": 2.5}, "num_classes is 2.5"),
        ({"in_chans": "L"}, "in_chans is 'L', but must be 1 or more, a whole number"),
        ({"seed": "today"}, "seed is 'today', but must be 0 or more, a whole number"),
        ({"widht": 0.5}, "there is no setting widht; a network has width, num_classes, in_chans"),
        ({"pretraned": True}, "there is no setting pretraned"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named_with_what_it_must_be(settings, message):
    with pytest.raises(InputError, match=message):
        snet.get_model(NAME, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: snet.get_model(5), "5 cannot be read or written"),
        (lambda: snet.load(None), "None cannot be read or written"),
        (lambda: snet.inference_model(5, "image.jpg"), "5 cannot be read or written"),
        (lambda: snet.inference_model(snet.get_model(NAME), None), "an image is object"),
        (lambda: snet.train("digits", "runs/none"), "config is 'digits', but must be a TrainConfig"),
        (lambda: snet.train(PRESETS["digits"], 5), "5 cannot be read or written"),
        (lambda: snet.TrainConfig(data="digits", epochs="3"), "epochs = '3', but it must be int"),
        (lambda: snet.TrainConfig(data=3), "data = 3, but it must be str"),
        (lambda: snet.TrainConfig(data="digits", lowering=[]), r"lowering = \[\], but it must be one of"),
        (lambda: snet.TrainConfig(data="digits", width=[1.0]), r"width is \[1.0\], but must be one of"),
        (lambda: snet.TrainConfig(data="digits", channels="24,48"), "channels is '24,48', but must be a sequence"),
        (lambda: snet.TrainConfig(data="digits", repeats=4), "repeats is 4, .*`aug_repeats` says how often"),
        (lambda: snet.ShuffleNetV2(channels=5), "channels is 5, but must be a sequence of whole numbers"),
        (lambda: snet.ShuffleNetV2(width=None), "width is None, but must be one of .*; `channels` describes"),
        (lambda: snet.ShuffleNetV2(num_classes="ten"), "num_classes is 'ten'"),
        (lambda: snet.ShuffleNetV2(conv5=False), "a classifier needs conv5"),
    ],
)
def test_a_wrong_argument_of_a_public_function_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
