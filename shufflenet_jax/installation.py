"""Checks of the installation: a supported system, and the packages of the extras in pyproject.toml."""

import importlib.util
import sys

from .errors import InputError

EXTRAS = {  # {extra: the packages that it installs}
    "torch": ("torch",),
    "export": ("onnx", "onnxruntime"),
    "tflite": ("ai_edge_litert",),
    "hub": ("huggingface_hub",),
}


def require_system() -> None:
    """Raise InputError on Windows, which lacks the file locks that the package needs."""
    if sys.platform == "win32":
        raise InputError("Windows is not supported; use the Windows Subsystem for Linux (WSL)")


def require_packages(*names: str) -> None:
    """Raise InputError, which names the extra, if a package is not installed; import nothing.

    Args:
      names: of the packages' modules.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise missing_package(name)


def missing_package(name: str) -> InputError:
    """Return the error for a package that is not installed, with the command that installs it.

    Args:
      name: of the package's module.
    """
    extra = next((f"[{extra}]" for extra, packages in EXTRAS.items() if name in packages), "")
    again = "" if extra else "--force-reinstall "  # Only a damaged installation lacks a package of the core.
    return InputError(f"the package {name} is missing; run pip install {again}'shufflenet_jax{extra}'")
