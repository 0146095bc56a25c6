"""Settings of the process that commands choose and imports do not: the compilation cache, memory kept for reuse."""

import contextlib
import ctypes
import logging
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

from .files import CACHE, cache_dir, why_unwritable

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # The names and numbers of malloc.h.


def enable_compilation_cache() -> None:
    """Keep JAX's compiled programs in the cache folder for later processes, unless a folder is already set.

    Commands call it at their start. In Python you may call it at any time; it affects later compilations.
    """
    loaded: Any = sys.modules.get("jax")  # Importing it takes longer than many commands.
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or (loaded and loaded.config.jax_compilation_cache_dir is not None):
        return
    directory = cache_dir() / "compiled"
    reason = why_unwritable(directory)
    if reason:
        again = "every process compiles its programs again"
        logger.warning(
            "the cache %s cannot be written (%s): %s; %s names another folder", directory, reason, again, CACHE
        )
        return
    if not loaded:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    else:
        from jax.experimental.compilation_cache import compilation_cache

        loaded.config.update("jax_compilation_cache_dir", str(directory))
        compilation_cache.reset_cache()  # The first compilation may have decided against a cache.


@contextlib.contextmanager
def compiling_for_elsewhere() -> Iterator[None]:
    """Let JAX compute only on the CPU and keep no compiled programs, within the block.

    JAX then looks for no accelerators; libtpu prints long messages if there are none.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    chosen = {"jax_platforms": "cpu", "jax_enable_compilation_cache": False}
    before = {name: getattr(jax.config, name) for name in chosen}
    for name, value in chosen.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # The first compilation has decided against a cache.


def keep_freed_memory() -> None:
    """Let the C library reuse memory that a step has freed instead of returning it to the system.

    XLA allocates memory at each step, and each fresh page costs a fault: a third of the time of a training step.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_ARENA_MAX, 1)  # The arenas of other threads hold no large blocks.
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
