"""Descriptions of accelerators that are not here, for a compiler: TPU slices by libtpu, GPUs by JAX's CUDA plugin."""

import os
import re
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.experimental import topologies

from .errors import InputError

Topology: TypeAlias = topologies.TopologyDescription
GIB = 2**30
H100_BYTES = 84_929_347_584
# CUDA's report about an H100 SXM, for which XLA compiles; the fields are those of XLA's GpuTargetConfigProto.
H100 = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }} core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  device_memory_size: {H100_BYTES} memory_bandwidth: 3352320000000 l2_cache_size: 52428800
}}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
"""


class Slice(NamedTuple):
    """Devices that work together.

    Attributes:
      name: like "v5e:16x16".
      devices: all of them, for JAX to compile for; none of them can compute.
      memory: bytes of each.
      compiler_options: XLA's options for compiling without these devices.
    """

    name: str
    devices: tuple[Any, ...]
    memory: int
    compiler_options: dict[str, Any]


class _Kind(NamedTuple):
    """A kind of accelerator.

    Attributes:
      sides: how many numbers a slice's name has.
      memory: bytes of a device.
      example: a slice's name.
    """

    sides: int
    memory: int
    example: str


KINDS = {
    "v5e": _Kind(2, 16 * GIB, "v5e:16x16"),
    "v5p": _Kind(3, 95 * GIB, "v5p:4x4x4"),
    "v6e": _Kind(2, 32 * GIB, "v6e:2x2"),
    "h100": _Kind(2, H100_BYTES, "h100:1x8 (hosts x GPUs)"),
}


def find_slice(name: str) -> Slice:
    """Return the Slice of a name.

    Args:
      name: like "v5e:16x16" or, for four hosts of eight GPUs, "h100:4x8".

    Raises:
      InputError: no slice has this name, or the package that compiles for it is not installed.
    """
    kind, _, sides = name.partition(":")
    numbers = re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", sides)
    if kind not in KINDS or not numbers or sides.count("x") + 1 != KINDS[kind].sides:
        examples = ", ".join(kind.example for kind in KINDS.values())
        raise InputError(f"{name!r} is not the name of a slice of accelerators; names are like {examples}")
    find = _find_gpus if kind == "h100" else _find_tpus
    devices = tuple(_describe(name, find, sides).devices)
    # Autotuning runs kernels, for which there is no device.
    options = {"xla_gpu_autotune_level": 0} if kind == "h100" else {}
    return Slice(name, devices, KINDS[kind].memory, options)


def _describe(name: str, find: Callable[[str, str], Topology], sides: str) -> Topology:
    try:
        return find(name, sides)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0].partition(": ")[2] or error
        raise InputError(f"nothing compiles for {name}: {reason}; choose another slice") from error


def _find_tpus(name: str, _: str) -> Topology:
    if find_spec("libtpu") is None:
        raise _missing(name, "libtpu", "tpu")
    # libtpu allows one process at a time, since the chips do; but several may compile.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def _find_gpus(name: str, sides: str) -> Topology:
    plugins = find_spec("jax_plugins")
    if plugins is None or not any(find_spec(f"jax_plugins.xla_cuda{number}") for number in (12, 13)):
        raise _missing(name, "JAX's CUDA plugin", "cuda13")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # Else the plugin asks a driver that is not here.
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x{sides}")


def _missing(name: str, package: str, extra: str) -> InputError:
    return InputError(
        f"compiling for {name} needs {package}, which is not installed; pip install 'jax[{extra}]=={version('jax')}', "
        "best in a separate environment"
    )
