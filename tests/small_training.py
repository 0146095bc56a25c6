"""train.py on networks of 4 units instead of 16, of both kinds, which compile in a quarter of the time.

As a script it runs one process of a training: `python tests/small_training.py [--at STEP SIGNAL] OPTIONS-OF-TRAIN`. It
sends itself a signal before a step, and tells with each checkpoint a hash of the state, which is the same on all of
its devices. With `eval OPTIONS-OF-EVAL` it is one process of an evaluation.
"""

import contextlib
import hashlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

from shufflenet_jax import architecture, model, parallel
from shufflenet_jax.commands import console, evaluate, train
from shufflenet_jax.training import loop

# Options of a network with units of both kinds that takes next to no time to compute.
TINY_TABLE = ("--channels", "8,16,16,16,32", "--repeats", "2,1,1")


@contextlib.contextmanager
def few_units(stage2=2):
    """Networks have few units within the block."""
    usual = dict(architecture.TABLES)
    _set_tables({width: table._replace(repeats=(stage2, 1, 1)) for width, table in usual.items()})
    try:
        yield
    finally:
        _set_tables(usual)


def _set_tables(tables):
    architecture.TABLES.update(tables)
    model._variable_shapes.cache_clear()
    jax.clear_caches()  # What is traced is known by the network alone.


def assert_copies_agree(tree):
    """Every device must hold the same bits of every array."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        copies = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        assert len(set(copies)) == 1, f"copies differ: {jax.tree_util.keystr(path)}"


def interrupted(shown, step, number):
    """The batches of `loop.shown`; the signal comes before the one of a step."""

    def batches(fed, epoch, start, stop):
        for taken, batch in enumerate(shown(fed, epoch, start, stop), start=start):
            if taken == step:
                os.kill(os.getpid(), number)
            yield batch

    return batches


def telling(to_host):
    """`parallel.to_host` that prints a hash of what it copies, the same on all devices."""

    def told(tree):
        assert_copies_agree(tree)
        found = hashlib.sha256()
        for leaf in jax.tree.leaves(tree):
            found.update(np.asarray(leaf).tobytes())
        print("state", found.hexdigest())
        return to_host(tree)

    return told


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--at":
        loop.shown = interrupted(loop.shown, int(words[1]), signal.Signals[words[2]])
        words = words[3:]
    parallel.SILENT_SECONDS = 10
    parallel.to_host = telling(parallel.to_host)
    main = train.main
    if words[0] == "eval":
        main, words = evaluate.main, words[1:]
    with few_units():
        sys.exit(console.run(main, words))
