"""A trained network as an ONNX graph, written node by node: batch norm folded, no shuffles, any number of images.

torch.onnx's exporter would need PyTorch and onnxscript and knows neither our small stems nor networks for grey images;
its graphs keep the shuffles, which cost ONNX Runtime a few percent.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..deploy import arrange, fold
from .network import Piece, add_network, outputs_of
from .quantization import round_weights, rounding_of

OPSET, IR_VERSION = 17, 8  # Of 2022: ONNX Runtime 1.12 and later, and what else is in use, read them.


def make_model(
    module,
    variables,
    preprocess,
    *,
    batch=None,
    size=None,
    with_preprocessing=False,
    features=False,
    quantization=None,
    metadata=None,
):
    """The network as an ONNX model.

    Args:
      module, variables: a ShuffleNetV2 and its {"params", "batch_stats"}.
      preprocess: its Preprocess: the side of the images, and how they are normalised.
      batch: images a call; None leaves it open.
      size: (height, width) of the images; None: those of the preprocessing.
      with_preprocessing: take uint8 (batch, height, width, C) crops in RGB or grey instead of normalised float32
        (batch, C, height, width).
      features: put out the stages instead of logits.
      quantization: a Quantization; None computes in float32.
      metadata: {name: text} to keep in it.
    Returns:
      (ModelProto, names of the activations that 8 bits need ranges of). Its input is `images`; its outputs are those of
      `outputs_of`.
    """
    graph = Graph(quantization)
    rows, channels = batch or "batch", preprocess.channels
    height, width = size or preprocess.size
    images = "images"
    if with_preprocessing:
        images = _normalized(graph, preprocess)
        if quantization:  # Its ranges are those of a graph that takes normalised images.
            ranges = quantization.ranges
            graph.quantization = quantization._replace(ranges={**ranges, images: ranges["images"]})
    outputs = outputs_of(module, features=features)
    outputs = add_network(graph, module, arrange(module, fold(variables)), graph.activation(images), outputs)
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
        rounding = self._scales[like] if like else rounding_of(*self.quantization.ranges[x])
        values = {"scale": rounding.scale, "zero": np.uint8(rounding.zero)}
        parameters = [self.constant(value, f"{x}/{name}") for name, value in values.items()]
        whole = self.node("QuantizeLinear", x, *parameters, name=f"{x}/quantized")
        rounded = self.node("DequantizeLinear", whole, *parameters, name=f"{x}/rounded")
        self._scales[rounded] = rounding
        return rounded

    def weights(self, x, kernel, bias, name):
        """The names of a layer's kernel (O, ...) and bias (O,), which may be None, for what follows x."""
        kernel, bias = (None if array is None else np.asarray(array, np.float32) for array in (kernel, bias))
        if self.quantization is None:
            named = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
            return [self.constant(array, f"{name}/{leaf}") for leaf, array in named.items()]
        unit = self._scales[x].scale
        whole, steps, whole_bias = round_weights(kernel, bias, unit, self.quantization.largest_weight)
        rounded = [self._per_row(whole, steps, f"{name}/kernel")]
        if whole_bias is not None:
            rounded.append(self._per_row(whole_bias, (unit * steps).astype(np.float32), f"{name}/bias"))
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

    def max_pool(self, x, name):
        pooled = self.node("MaxPool", x, name=name, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        return self.activation(pooled, like=x)

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

    def reorder(self, x, order, name):
        return self.node("Gather", x, self.constant(order, f"{name}/order"), name=name, axis=1)

    def global_mean(self, x, name):
        mean = self.activation(self.node("GlobalAveragePool", x, name="mean"))
        pooled = self.node("Flatten", mean, name=name)
        if self.quantization:
            self._scales[pooled] = self._scales[mean]
        return pooled

    def dense(self, x, params, name):
        x = self.activation(x, like=x)
        inputs = x, *self.weights(x, np.asarray(params["kernel"]).T, params.get("bias"), "fc")
        return self.node("Gemm", *inputs, name=name, transB=1)


def _normalized(graph, preprocess):
    """`normalization.normalize` of the uint8 images, and channels first."""
    x = graph.node("Cast", "images", name="images/float", to=TensorProto.FLOAT)
    if preprocess.channel_order == "BGR":
        x = graph.node("Gather", x, graph.numbers(2, 1, 0), name="images/bgr", axis=3)
    for kind, value in (("Mul", preprocess.scale), ("Sub", preprocess.mean), ("Div", preprocess.std)):
        vector = graph.constant(np.array(value, np.float32), f"images/{kind.lower()}/value")
        x = graph.node(kind, x, vector, name=f"images/{kind.lower()}")
    return graph.node("Transpose", x, name="images/normalized", perm=[0, 3, 1, 2])
