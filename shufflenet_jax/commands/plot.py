"""`python -m shufflenet_jax plot`: draws the curves of a training, finished or not."""

from ..files import path_of
from ..training.curves import plot_curves
from .parsing import CommandLine, program_of

DESCRIPTION = "Draw loss, accuracy and learning rate of a training into its folder."


def main(argv):
    parser = CommandLine(prog=program_of("plot"), description=DESCRIPTION)
    parser.add_argument("workdir", help="the folder of the training")
    options = parser.parse_args(argv)
    print(plot_curves(path_of(options.workdir)))
    return 0
