"""A trained network as an ONNX graph, written node by node: batch norm folded, no shuffles, any number of images.

torch.onnx's exporter would need PyTorch and onnxscript, and supports neither our small stems nor networks for grey
images; its graphs keep the shuffles, which cost ONNX Runtime a few percent.
"""

from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..config import Preprocess
from ..deploy import arrange, fold
from ..model import ShuffleNetV2
from ..shapes import Params, Variables
from .network import Piece, add_network, outputs_of
from .quantization import Quantization, Rounding, round_weights, rounding_of

OPSET, IR_VERSION = 17, 8  # Of 2022, which ONNX Runtime 1.12 and later, and other common runtimes, can read.


def make_model(
    module: ShuffleNetV2,
    variables: Variables,
    preprocess: Preprocess,
    *,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    with_preprocessing: bool = False,
    features: bool = False,
    quantization: Quantization | None = None,
    metadata: dict[str, str] | None = None,
) -> tuple[onnx.ModelProto, list[str]]:
    """Convert a network to an ONNX model.

    Args:
      module: the network.
      variables: its {"params", "batch_stats"}.
      preprocess: size of the images, and how to normalize them.
      batch: images per call; None means any number.
      size: (height, width) of the images; None means those of the preprocessing.
      with_preprocessing: take uint8 (batch, height, width, C) crops in RGB or grey instead of normalized float32
        (batch, C, height, width).
      features: return the stages instead of logits.
      quantization: how to compute in 8 bits; None computes in float32.
      metadata: {name: text} to store in the model.

    Returns:
      (the model, names of the activations that need ranges for 8 bits). The model's input is `images`; its outputs are
      those of `outputs_of`.
    """
    graph = Graph(quantization)
    rows, channels = batch or "batch", preprocess.channels
    height, width = size or preprocess.size
    images = "images"
    if with_preprocessing:
        images = _normalized(graph, preprocess)
        if quantization and quantization.ranges:  # They belong to a graph that takes normalized images.
            ranges = quantization.ranges
            graph.quantization = quantization._replace(ranges={**ranges, images: ranges["images"]})
    names = outputs_of(module, features=features)
    outputs = add_network(graph, module, arrange(module, fold(variables)), graph.activation(images), names)
    kind, shape = TensorProto.FLOAT, [rows, channels, height, width]
    if with_preprocessing:
        kind, shape = TensorProto.UINT8, [rows, height, width, channels]
    proto = helper.make_graph(
        graph.nodes,
        "shufflenet_v2",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs],
        [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    model = helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="shufflenet_jax"
    )
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    return model, graph.activations


Attribute: TypeAlias = Any  # ONNX has attributes of several types.


class Graph:
    """A graph of nodes and constants. A node has the name of its output.

    Args:
      quantization: how to compute in 8 bits; None computes in float32.

    Attributes:
      quantization: the same.
      nodes: of the graph, in order.
      constants: {name: array}.
      activations: names of the activations that need ranges for 8 bits.
    """

    def __init__(self, quantization: Quantization | None) -> None:
        self.quantization = quantization
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.activations: list[str] = []
        self._scales: dict[str, Rounding] = {}

    def node(self, kind: str, *inputs: str, name: str, **attributes: Attribute) -> str:
        """Add a node, and return its name.

        Args:
          kind: the operator.
          inputs: names of its inputs.
          name: of the node and its output.
          attributes: of the operator.
        """
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, array: np.ndarray | np.generic, name: str) -> str:
        """Add a constant, and return its name.

        Args:
          array: its value.
          name: of the constant.
        """
        self.constants[name] = np.ascontiguousarray(array)
        return name

    def numbers(self, *values: int) -> str:
        """Add a constant of integers, and return its name.

        Args:
          values: the integers.
        """
        return self.constant(np.array(values, np.int64), "numbers/" + "_".join(map(str, values)))

    def activation(self, x: str, *, like: str | None = None) -> str:
        """Return the name of an activation for the layers that take it: with quantization, rounded to 8 bits.

        Args:
          x: its name.
          like: the rounded activation whose range it shares; None gives it its own range.
        """
        if like is None:
            self.activations.append(x)
        if self.quantization is None or self.quantization.ranges is None:
            return x
        rounding = self._scales[like] if like else rounding_of(*self.quantization.ranges[x])
        values: dict[str, np.generic] = {"scale": rounding.scale, "zero": np.uint8(rounding.zero)}
        parameters = [self.constant(value, f"{x}/{name}") for name, value in values.items()]
        whole = self.node("QuantizeLinear", x, *parameters, name=f"{x}/quantized")
        rounded = self.node("DequantizeLinear", whole, *parameters, name=f"{x}/rounded")
        self._scales[rounded] = rounding
        return rounded

    def weights(self, x: str, kernel: np.ndarray, bias: np.ndarray | None, name: str) -> list[str]:
        """Add a layer's weights, and return their names.

        Args:
          x: name of the layer's input.
          kernel: (O, ...).
          bias: (O,), or None.
          name: of the layer.
        """
        kernel = np.asarray(kernel, np.float32)
        bias = None if bias is None else np.asarray(bias, np.float32)
        if self.quantization is None:
            named = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
            return [self.constant(array, f"{name}/{leaf}") for leaf, array in named.items()]
        unit = self._scales[x].scale
        whole, steps, whole_bias = round_weights(kernel, bias, unit, self.quantization.largest_weight)
        rounded = [self._per_row(whole, steps, f"{name}/kernel")]
        if whole_bias is not None:
            rounded.append(self._per_row(whole_bias, (unit * steps).astype(np.float32), f"{name}/bias"))
        return rounded

    def _per_row(self, whole: np.ndarray, scale: np.ndarray, name: str) -> str:
        zeros = np.zeros(len(whole), whole.dtype)
        inputs = (whole, f"{name}/quantized"), (scale, f"{name}/scale"), (zeros, f"{name}/zero")
        return self.node("DequantizeLinear", *(self.constant(*given) for given in inputs), name=name, axis=0)

    def layer(self, x: str, params: Params, name: str, *, stride: int = 1) -> str:
        """Add a convolution and, unless it is a depthwise one, bias and ReLU.

        Args:
          x: name of its input.
          params: {"conv": {"kernel", "bias"}}.
          name: of its output.
          stride: in both directions.
        """
        kernel = np.asarray(params["conv"]["kernel"])
        size, pad, bias = kernel.shape[0], (kernel.shape[0] - 1) // 2, params["conv"].get("bias")
        settings: dict[str, Any] = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        settings["group"] = 1 if bias is not None else kernel.shape[-1]
        inputs = x, *self.weights(x, kernel.transpose(3, 2, 0, 1), bias, name)
        if bias is None:
            return self.activation(self.node("Conv", *inputs, name=name, **settings))
        return self.activation(
            self.node("Relu", self.node("Conv", *inputs, name=f"{name}/conv", **settings), name=name)
        )

    def max_pool(self, x: str, name: str) -> str:
        """Add the stem's pooling.

        Args:
          x: name of its input.
          name: of its output.
        """
        pooled = self.node("MaxPool", x, name=name, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        return self.activation(pooled, like=x)

    def cut(self, piece: Piece, channels: slice, name: str) -> Piece:
        """Add a slice of a piece's channels.

        Args:
          piece: the piece.
          channels: the slice.
          name: of its output.
        """
        count = len(range(*channels.indices(piece.channels)))
        if count == piece.channels:
            return piece
        bounds = (channels.start, channels.stop, 1, channels.step)  # The third is the axis.
        cut = self.node("Slice", piece.name, *map(self.numbers, bounds), name=name)
        return Piece(self.activation(cut, like=piece.name), count)

    def join(self, pieces: list[Piece], name: str) -> str:
        """Add a concatenation of channels.

        Args:
          pieces: in their order.
          name: of its output.
        """
        if len(pieces) == 1:
            return pieces[0].name
        return self.activation(self.node("Concat", *(piece.name for piece in pieces), name=name, axis=1))

    def reorder(self, x: str, order: np.ndarray, name: str) -> str:
        """Add a permutation of channels.

        Args:
          x: name of its input.
          order: int (C,), for each output channel its input channel.
          name: of its output.
        """
        return self.node("Gather", x, self.constant(order, f"{name}/order"), name=name, axis=1)

    def global_mean(self, x: str, name: str) -> str:
        """Add the mean over all pixels, (B, C).

        Args:
          x: name of its input.
          name: of its output.
        """
        mean = self.activation(self.node("GlobalAveragePool", x, name="mean"))
        pooled = self.node("Flatten", mean, name=name)
        if self.quantization:
            self._scales[pooled] = self._scales[mean]
        return pooled

    def dense(self, x: str, params: Params, name: str) -> str:
        """Add the classifier.

        Args:
          x: name of its input.
          params: {"kernel", "bias"}.
          name: of its output.
        """
        x = self.activation(x, like=x)
        inputs = x, *self.weights(x, np.asarray(params["kernel"]).T, params.get("bias"), "fc")
        return self.node("Gemm", *inputs, name=name, transB=1)


def _normalized(graph: Graph, preprocess: Preprocess) -> str:
    """Add the normalization of uint8 images, and move channels to the front."""
    x = graph.node("Cast", "images", name="images/float", to=TensorProto.FLOAT)
    if preprocess.channel_order == "BGR":
        x = graph.node("Gather", x, graph.numbers(2, 1, 0), name="images/bgr", axis=3)
    for kind, value in (("Mul", preprocess.scale), ("Sub", preprocess.mean), ("Div", preprocess.std)):
        vector = graph.constant(np.array(value, np.float32), f"images/{kind.lower()}/value")
        x = graph.node(kind, x, vector, name=f"images/{kind.lower()}")
    return graph.node("Transpose", x, name="images/normalized", perm=[0, 3, 1, 2])
