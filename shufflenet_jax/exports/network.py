"""The deployed network in any format: layers, and slices and concatenations of channels instead of shuffles."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..deploy import plans
from ..model import ShuffleNetV2
from ..shapes import Params

FEATURES = ("stage2", "stage3", "stage4")  # The outputs of an export of features, in the network's order of channels.


class Signature(NamedTuple):
    """The input and outputs of an exported network.

    Attributes:
      batch: images per call; None means any number.
      size: height and width of the images; None means those of the preprocessing.
      with_preprocessing: whether it takes uint8 crops instead of normalized float32.
      features: whether it returns FEATURES instead of logits.
    """

    batch: int | None = None
    size: tuple[int, int] | None = None
    with_preprocessing: bool = False
    features: bool = False


class Piece(NamedTuple):
    """An activation.

    Attributes:
      name: of the activation.
      channels: their number.
    """

    name: str
    channels: int


@runtime_checkable
class Graph(Protocol):
    """The operations that a format's graph can add. Each method takes and returns activations by their names."""

    def layer(self, x: str, params: Params, name: str, *, stride: int = 1) -> str:
        """Add a convolution and, unless it is a depthwise one, bias and ReLU."""

    def max_pool(self, x: str, name: str) -> str:
        """Add the stem's pooling: 3x3, stride 2."""

    def cut(self, piece: Piece, channels: slice, name: str) -> Piece:
        """Add a slice of a piece's channels."""

    def join(self, pieces: list[Piece], name: str) -> str:
        """Add a concatenation of channels."""

    def reorder(self, x: str, order: np.ndarray, name: str) -> str:
        """Add a permutation of channels."""

    def global_mean(self, x: str, name: str) -> str:
        """Add the mean over all pixels, (B, C)."""

    def dense(self, x: str, params: Params, name: str) -> str:
        """Add the classifier."""


def outputs_of(module: ShuffleNetV2, *, features: bool = False) -> tuple[str, ...]:
    """Return the names of an export's outputs: FEATURES, logits, or the last feature of a backbone.

    Args:
      module: the network.
      features: whether to return FEATURES.
    """
    if features:
        return FEATURES
    if not module.conv5:
        return ("stage4",)
    return ("logits",) if module.num_classes else ("pooled",)


def add_network(graph: Graph, module: ShuffleNetV2, params: Params, images: str, outputs: Sequence[str]) -> list[str]:
    """Add the network to a graph, up to its last output.

    Args:
      graph: of any format.
      module: the network.
      params: its folded parameters, arranged by `deploy.arrange`.
      images: name of the normalized images.
      outputs: names from `outputs_of`.

    Returns:
      The names of the outputs in the graph.
    """
    made = {}
    x = graph.layer(images, params["conv1"], "conv1", stride=1 if module.small_stem else 2)
    if not module.small_stem:
        x = graph.max_pool(x, "stem")
    for stage, steps, positions in plans(module, params):
        pieces = _first_unit(graph, x, params[f"{stage}_unit0"], f"{stage}_unit0")
        for index, step in enumerate(steps, start=1):
            unit, name = params[f"{stage}_unit{index}"], f"{stage}_unit{index}"
            goes, stays = (
                [
                    graph.cut(pieces[piece], channels, f"{name}/{side}{part}")
                    for part, (piece, channels) in enumerate(cuts)
                ]
                for side, cuts in (("right", step.right), ("left", step.left))
            )
            pieces = [*stays, _right_branch(graph, graph.join(goes, f"{name}/right"), unit, name, stride=1)]
        x = graph.join(pieces, f"{stage}/channels")
        if stage in outputs:
            made[stage] = graph.reorder(x, np.argsort(positions), stage)
    if set(outputs) & {"pooled", "logits"}:
        x = graph.layer(x, params["conv5"], "conv5")
        x = made["pooled"] = graph.global_mean(x, "pooled")
    if "logits" in outputs:
        made["logits"] = graph.dense(x, params["fc"], "logits")
    return [made[name] for name in outputs]


def _first_unit(graph: Graph, x: str, unit: Params, name: str) -> list[Piece]:
    left = graph.layer(x, unit["left_dw"], f"{name}/left_dw", stride=2)
    left = graph.layer(left, unit["left_pw"], f"{name}/left_pw")
    return [Piece(left, _channels(unit["left_pw"])), _right_branch(graph, x, unit, name, stride=2)]


def _right_branch(graph: Graph, x: str, unit: Params, name: str, *, stride: int) -> Piece:
    x = graph.layer(x, unit["right_pw1"], f"{name}/right_pw1")
    x = graph.layer(x, unit["right_dw"], f"{name}/right_dw", stride=stride)
    return Piece(graph.layer(x, unit["right_pw2"], f"{name}/right_pw2"), _channels(unit["right_pw2"]))


def _channels(layer: Params) -> int:
    return layer["conv"]["kernel"].shape[-1]
