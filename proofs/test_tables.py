"""Networks of random channel tables: twelve a dialect convert, compute what PyTorch computes, and come back."""

import os

import pytest
from random_tables import DIALECTS, assert_network_is_pytorchs, random_table

from shufflenet_jax.porting import dialects

SHARE = float(os.environ.get("SHARE", "1"))  # Of the proof that is to be run.
SEED = int(os.environ.get("SEED", "2026"))


@pytest.mark.parametrize("number", range(max(1, round(12 * SHARE))))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_network_of_a_random_table_is_pytorchs(dialect, number, tmp_path):
    table = random_table([SEED, number], dialects.DIALECTS[dialect].layout)
    assert_network_is_pytorchs(dialect, table, tmp_path, seed=number)
