"""See shufflenet_jax/commands/train.py, which holds this command."""

import sys

from shufflenet_jax.__main__ import entry

if __name__ == "__main__":
    sys.exit(entry("train"))
