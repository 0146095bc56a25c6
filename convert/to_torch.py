"""Convert a model directory to a PyTorch checkpoint. The command is in shufflenet_jax/commands/to_torch.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # Run without an installed package too.

from shufflenet_jax.__main__ import entry

if __name__ == "__main__":
    sys.exit(entry("convert-back"))
