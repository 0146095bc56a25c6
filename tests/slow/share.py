"""How much of the long tests shall run: the environment variable SHARE, from 0 to 1."""

import os

import pytest

SHARE = float(os.environ.get("SHARE", "1"))
in_full = pytest.mark.skipif(SHARE < 1, reason="SHARE asks for a part of the long tests")
