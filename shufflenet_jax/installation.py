"""What must be installed: a system that is supported, and the packages of the extras in pyproject.toml."""

import importlib.util
import sys

from .errors import InputError

EXTRAS = {  # {extra: the packages it brings}
    "torch": ("torch",),
    "export": ("onnx", "onnxruntime"),
    "tflite": ("ai_edge_litert",),
    "hub": ("huggingface_hub",),
}


def require_system() -> None:
    """Raise InputError on Windows, which has no locks of files as the package needs them."""
    if sys.platform == "win32":
        raise InputError("Windows is not supported; use the Windows Subsystem for Linux (WSL)")


def require_packages(*names: str) -> None:
    """Raise InputError, which names the extra, where a package is not installed; nothing is imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise missing_package(name)


def missing_package(name: str) -> InputError:
    """Return the error for a package that is not installed: the line that brings it."""
    extra = next((f"[{extra}]" for extra, packages in EXTRAS.items() if name in packages), "")
    again = "" if extra else "--force-reinstall "  # One of the core is there unless somebody removed it.
    return InputError(f"the package {name} is missing; run pip install {again}'shufflenet_jax{extra}'")
