"""A trained network as an ONNX graph, written node by node: batch norm folded, no shuffles, any number of images.

torch.onnx's exporter would need PyTorch and onnxscript and knows neither our small stems nor networks for grey images;
its graphs keep the shuffles, which cost ONNX Runtime a few percent.
"""

from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..deploy import arrange, fold, plans

OPSET, IR_VERSION = 17, 8  # Of 2022: ONNX Runtime 1.12 and later, and what else is in use, read them.
LEVELS = 255  # Steps of an activation in 8 bits.


class Quantization(NamedTuple):
    """How a graph computes in 8 bits."""

    ranges: dict  # {activation: (least, largest) value that its 8 bits stand for}.
    largest_weight: int  # 127, or 63 where products of 8 bits would overflow.


class Piece(NamedTuple):
    """An activation by its name, and how many channels it has."""

    name: str
    channels: int


def make_model(
    module, variables, preprocess, *, batch=None, with_preprocessing=False, quantization=None, metadata=None
):
    """The network as an ONNX model.

    Args:
      module, variables: a ShuffleNetV2 and its {"params", "batch_stats"}.
      preprocess: its Preprocess: the side of the images, and how they are normalised.
      batch: images a call; None leaves it open.
      with_preprocessing: take uint8 (batch, side, side, C) crops in RGB or grey instead of normalised float32
        (batch, C, side, side).
      quantization: a Quantization; None computes in float32.
      metadata: {name: text} to keep in it.
    Returns:
      (ModelProto, names of the activations that 8 bits need ranges of). Its input is `images`; its output `logits`, or
      of backbones their last feature, `pooled` or `stage4`.
    """
    graph = Graph(quantization)
    rows, side, channels = batch or "batch", preprocess.crop, preprocess.channels
    images = "images"
    if with_preprocessing:
        images = _normalized(graph, preprocess)
        if quantization:  # Its ranges are those of a graph that takes normalised images.
            quantization.ranges[images] = quantization.ranges["images"]
    output = _network(graph, module, arrange(module, fold(variables)), images)
    kind, shape = TensorProto.FLOAT, [rows, channels, side, side]
    if with_preprocessing:
        kind, shape = TensorProto.UINT8, [rows, side, side, channels]
    proto = helper.make_graph(
        graph.nodes,
        "shufflenet_v2",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    model = helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="shufflenet_jax"
    )
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    return model, graph.activations


class Graph:
    """Nodes and constants as they are added. A node has the name of its output."""

    def __init__(self, quantization):
        self.quantization = quantization
        self.nodes, self.constants, self.activations, self._scales = [], {}, [], {}

    def node(self, kind, *inputs, name, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, array, name):
        self.constants[name] = np.ascontiguousarray(array)
        return name

    def numbers(self, *values):
        return self.constant(np.array(values, np.int64), "numbers/" + "_".join(map(str, values)))

    def activation(self, x, *, like=None):
        """An activation as those that take it see it: with quantisation, rounded to 8 bits.

        Args:
          x: its name.
          like: the rounded activation whose range it shares; None gives it one of its own.
        """
        if like is None:
            self.activations.append(x)
        if self.quantization is None:
            return x
        if like is None:
            least, largest = self.quantization.ranges[x]
            # Zero is a level of its own: padding with it must not shift anything.
            least, largest = min(least, 0.0), max(largest, 1e-6)
            scale = np.float32((largest - least) / LEVELS)
            found = scale, np.uint8(np.clip(round(-least / scale), 0, LEVELS))
        else:
            found = self._scales[like]
        parameters = [self.constant(value, f"{x}/{name}") for name, value in zip(("scale", "zero"), found, strict=True)]
        whole = self.node("QuantizeLinear", x, *parameters, name=f"{x}/quantized")
        rounded = self.node("DequantizeLinear", whole, *parameters, name=f"{x}/rounded")
        self._scales[rounded] = found
        return rounded

    def weights(self, x, kernel, bias, name):
        """The names of a layer's kernel (O, ...) and bias (O,), which may be None, for what follows x."""
        kernel, bias = (None if array is None else np.asarray(array, np.float32) for array in (kernel, bias))
        if self.quantization is None:
            named = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
            return [self.constant(array, f"{name}/{leaf}") for leaf, array in named.items()]
        most = self.quantization.largest_weight
        unit, scale = self._scales[x][0], np.abs(kernel).reshape(len(kernel), -1).max(1) / most
        if bias is not None:
            scale = np.maximum(scale, np.abs(bias) / unit / 2**30)  # Biases are 32-bit multiples of both scales.
        scale = np.maximum(scale, 1e-12).astype(np.float32)
        whole = np.clip(np.round(kernel / scale.reshape(-1, *[1] * (kernel.ndim - 1))), -most, most)
        rounded = [self._per_row(whole.astype(np.int8), scale, f"{name}/kernel")]
        if bias is not None:
            steps = (unit * scale).astype(np.float32)
            whole = np.round(bias / steps.astype(np.float64)).astype(np.int32)
            rounded.append(self._per_row(whole, steps, f"{name}/bias"))
        return rounded

    def _per_row(self, whole, scale, name):
        zeros = np.zeros(len(whole), whole.dtype)
        inputs = (whole, f"{name}/quantized"), (scale, f"{name}/scale"), (zeros, f"{name}/zero")
        return self.node("DequantizeLinear", *(self.constant(*given) for given in inputs), name=name, axis=0)

    def layer(self, x, params, name, *, stride=1):
        """A convolution and, unless it is a depthwise one, bias and ReLU."""
        kernel = np.asarray(params["conv"]["kernel"])
        size, pad, bias = kernel.shape[0], (kernel.shape[0] - 1) // 2, params["conv"].get("bias")
        settings = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        settings["group"] = 1 if bias is not None else kernel.shape[-1]
        inputs = x, *self.weights(x, kernel.transpose(3, 2, 0, 1), bias, name)
        if bias is None:
            return self.activation(self.node("Conv", *inputs, name=name, **settings))
        return self.activation(
            self.node("Relu", self.node("Conv", *inputs, name=f"{name}/conv", **settings), name=name)
        )

    def cut(self, piece, channels, name):
        """The Piece with a slice of a piece's channels."""
        count = len(range(*channels.indices(piece.channels)))
        if count == piece.channels:
            return piece
        bounds = (channels.start, channels.stop, 1, channels.step)  # The third is the axis.
        cut = self.node("Slice", piece.name, *map(self.numbers, bounds), name=name)
        return Piece(self.activation(cut, like=piece.name), count)

    def join(self, pieces, name):
        if len(pieces) == 1:
            return pieces[0].name
        return self.activation(self.node("Concat", *(piece.name for piece in pieces), name=name, axis=1))


def _normalized(graph, preprocess):
    """`normalization.normalize` of the uint8 images, and channels first."""
    x = graph.node("Cast", "images", name="images/float", to=TensorProto.FLOAT)
    if preprocess.channel_order == "BGR":
        x = graph.node("Gather", x, graph.numbers(2, 1, 0), name="images/bgr", axis=3)
    for kind, value in (("Mul", preprocess.scale), ("Sub", preprocess.mean), ("Div", preprocess.std)):
        vector = graph.constant(np.array(value, np.float32), f"images/{kind.lower()}/value")
        x = graph.node(kind, x, vector, name=f"images/{kind.lower()}")
    return graph.node("Transpose", x, name="images/normalized", perm=[0, 3, 1, 2])


def _network(graph, module, params, images):
    """Adds the network; returns the name of its output."""
    x = graph.activation(images)
    x = graph.layer(x, params["conv1"], "conv1", stride=1 if module.small_stem else 2)
    if not module.small_stem:
        pooled = graph.node("MaxPool", x, name="stem", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        x = graph.activation(pooled, like=x)
    for stage, steps, positions in plans(module, params):
        unit, name = params[f"{stage}_unit0"], f"{stage}_unit0"
        left = graph.layer(x, unit["left_dw"], f"{name}/left_dw", stride=2)
        left = graph.layer(left, unit["left_pw"], f"{name}/left_pw")
        pieces = [Piece(left, _outputs(unit["left_pw"])), _right_branch(graph, x, unit, name, stride=2)]
        for index, step in enumerate(steps, start=1):
            unit, name = params[f"{stage}_unit{index}"], f"{stage}_unit{index}"
            goes, stays = (
                [
                    graph.cut(pieces[piece], channels, f"{name}/{side}{part}")
                    for part, (piece, channels) in enumerate(cut)
                ]
                for side, cut in (("right", step.right), ("left", step.left))
            )
            pieces = [*stays, _right_branch(graph, graph.join(goes, f"{name}/right"), unit, name, stride=1)]
        x, order = graph.join(pieces, f"{stage}/channels"), np.argsort(positions)
    if not module.conv5:
        return graph.node("Gather", x, graph.constant(order, "stage4/order"), name="stage4", axis=1)
    x = graph.layer(x, params["conv5"], "conv5")
    mean = graph.activation(graph.node("GlobalAveragePool", x, name="mean"))
    x = graph.node("Flatten", mean, name="pooled")
    if not module.num_classes:
        return x
    x = graph.activation(x, like=mean)
    inputs = x, *graph.weights(x, np.asarray(params["fc"]["kernel"]).T, params["fc"].get("bias"), "fc")
    return graph.node("Gemm", *inputs, name="logits", transB=1)


def _right_branch(graph, x, unit, name, *, stride):
    x = graph.layer(x, unit["right_pw1"], f"{name}/right_pw1")
    x = graph.layer(x, unit["right_dw"], f"{name}/right_dw", stride=stride)
    return Piece(graph.layer(x, unit["right_pw2"], f"{name}/right_pw2"), _outputs(unit["right_pw2"]))


def _outputs(layer):
    return layer["conv"]["kernel"].shape[-1]
