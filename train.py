"""See shufflenet_jax/commands/train.py, which holds this command."""

import sys

from shufflenet_jax.commands.console import run
from shufflenet_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(run(main))
