"""Which kind of case a seed draws for an index."""

import random

from .cases import KINDS, Scene
from .wild import WILD

SHARE = 0.4  # Of the cases that are inputs as people have them. Their draw leaves the kinds of all others as they were.


def kind_of(seed, index):
    """The kind that a seed draws for an index."""
    wild = random.Random(f"wild {seed}/{index}")
    if wild.random() < SHARE:
        return wild.choices(list(WILD), [often for often, _ in WILD.values()])[0]
    return random.Random(f"kind {seed}/{index}").choices(list(KINDS), [often for often, _ in KINDS.values()])[0]


def make_case(seed, index, kind, place, originals):
    """A Case of a kind, its inputs below a new folder."""
    for name in ("in", "out", "cwd"):
        (place / name).mkdir(parents=True)
    _, make = {**KINDS, **WILD}[kind]
    return make(Scene(random.Random(f"{seed}/{index}"), place, originals))
