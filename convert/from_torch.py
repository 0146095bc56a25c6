"""See shufflenet_jax/commands/from_torch.py, which holds this command."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # So that it also runs where the package is not installed.

from shufflenet_jax.__main__ import entry

if __name__ == "__main__":
    sys.exit(entry("convert"))
