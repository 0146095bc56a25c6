"""`python -m shufflenet_jax plot`: draws the curves of a training run, finished or not."""

from collections.abc import Sequence

from ..files import path_of
from ..training.curves import plot_curves
from .parsing import CommandLine, program_of

DESCRIPTION = "Draw loss, accuracy and learning rate of a training run into its folder."


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
      argv: its arguments.

    Returns:
      Its exit status.
    """
    parser = CommandLine(prog=program_of("plot"), description=DESCRIPTION)
    parser.add_argument("workdir", help="folder of the training run")
    options = parser.parse_args(argv)
    print(plot_curves(path_of(options.workdir)))
    return 0
