"""A trained network as a .tflite file, written operator by operator: batch norm folded, no shuffles, channels last.

The schema of the file is the one that LiteRT ships. A converter from StableHLO exists (litert-converter), but its
interface is undocumented, and it takes no ranges for 8 bits.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ..config import Preprocess
from ..deploy import arrange, fold
from ..inference import Model
from ..shapes import Params
from .network import Piece, Signature, add_network, outputs_of
from .quantization import Quantization, Rounding, round_weights, rounding_of
from .tflite_metadata import METADATA_NAME, described, with_labels

KINDS = {"float32": schema.TensorType.FLOAT32, "int32": schema.TensorType.INT32, "int64": schema.TensorType.INT64}
KINDS |= {"uint8": schema.TensorType.UINT8, "int8": schema.TensorType.INT8}
# The least version of an operator with 8-bit input; with float32 it is 1. Older runtimes refuse newer versions.
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "QUANTIZE": 2}
VERSIONS |= dict.fromkeys(["MAX_POOL_2D", "MEAN", "PAD", "CONCATENATION", "STRIDED_SLICE", "GATHER"], 2)
HYBRID = {"CONV_2D": 5, "FULLY_CONNECTED": 12}  # The same with float32 input and 8-bit weights.
PIXELS = Rounding(np.float32(1), 0)  # uint8 pixels without a change.
MIDDLE = 128  # Difference of uint8 and int8 for the same value.
MOST_JOINED = 5  # XNNPACK, which computes nearly everything, leaves larger concatenations to slower code.
OWN = "shufflenet_jax"  # The name of our own metadata: model.json.


class Written(NamedTuple):
    """A .tflite file.

    Attributes:
      content: its bytes.
      activations: names of those that need ranges for 8 bits.
      groups: {activation: the one whose range it shares}; concatenated activations share one.
    """

    content: bytes
    activations: list[str]
    groups: dict[str, str]


def make_model(
    model: Model,
    signature: Signature,
    *,
    quantization: Quantization | None = None,
    watched: bool = False,
    metadata: dict[str, str] | None = None,
    labels: dict[str, list[str]] | None = None,
) -> Written:
    """Convert a network to a .tflite file.

    Args:
      model: the network, its weights, and how to normalize images.
      signature: of the file. Its input is `images`, uint8 or float32 (batch, height, width, C); its outputs are those
        of `outputs_of`. A batch of None is written as 1, which the runtime may resize.
      quantization: with ranges, everything is in 8 bits, including input and outputs; without ranges, only the weights
        of 1x1 convolutions and of the classifier, which round their inputs at run time. None computes in float32.
      watched: output all activations, for `calibrate`.
      metadata: {name: JSON text} to store in it.
      labels: {file name: a line for each class} to store in it.
    """
    module, preprocess = model.module, model.info.preprocess
    graph = Graph(quantization, batch=signature.batch)
    height, width = signature.size or preprocess.size
    shape = signature.batch or 1, height, width, preprocess.channels
    params = arrange(module, fold(model.variables))
    if signature.with_preprocessing:
        graph.tensor("images", shape, "uint8", rounding=PIXELS if graph.quantization else None)
        images = _normalized(graph, preprocess)
        if preprocess.channel_order == "BGR":
            kernel = params["conv1"]["conv"]["kernel"][:, :, ::-1]
            params["conv1"] = {"conv": {**params["conv1"]["conv"], "kernel": kernel}}
    else:
        images = graph.activation("images", shape)
    names = outputs_of(module, features=signature.features)
    outputs = dict(zip(names, add_network(graph, module, params, images, names), strict=True))
    if watched:
        outputs = {name: name for name in graph.activations if name != "images"}
    texts = {OWN: json.dumps({name: json.loads(text) for name, text in (metadata or {}).items()}).encode()}
    if names == ("logits",):
        by_file = signature.with_preprocessing
        texts[METADATA_NAME] = described(preprocess, names[0], labels or {}, with_preprocessing=by_file)
    content = with_labels(graph.packed(outputs, texts), labels or {})
    return Written(content, graph.activations, graph.groups())


class Graph:
    """A graph of operators and tensors. An operator has the name of its output.

    Args:
      quantization: how to compute in 8 bits; None computes in float32.
      batch: images per call; None means any number.

    Attributes:
      dynamic: whether only weights have 8 bits.
      quantization: how to compute in 8 bits with ranges, or None.
      batch: images per call, or None.
      tensors: {name: tensor}, in order.
      buffers: of constants.
      codes: {(operator, version): its number}.
      operators: in order.
      activations: names of those that need ranges for 8 bits.
      roundings: {name of an activation: its Rounding}.
    """

    def __init__(self, quantization: Quantization | None, *, batch: int | None) -> None:
        self.dynamic = quantization is not None and quantization.ranges is None
        self.quantization, self.batch = None if self.dynamic else quantization, batch
        self.tensors: dict[str, Any] = {}
        self.buffers = [_Buffer()]  # The first one means no buffer.
        self.codes: dict[tuple[str, int], int] = {}
        self.operators: list[Any] = []
        self.activations: list[str] = []
        self.roundings: dict[str, Rounding] = {}
        self._parents: dict[str, str] = {}

    # Tensors

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        kind: str,
        *,
        rounding: Rounding | None = None,
        scales: np.ndarray | None = None,
        axis: int = 0,
        data: np.ndarray | None = None,
    ) -> str:
        """Add a tensor, and return its name.

        Args:
          name: of the tensor.
          shape: of the tensor.
          kind: its type, a key of KINDS.
          rounding: meaning of an activation's 8 bits.
          scales: (channels,), steps of a weight's 8 bits.
          axis: where the channels of a weight are.
          data: values of a constant; None for an activation.
        """
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.hasRank = name, list(map(int, shape)), KINDS[kind], True
        if data is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(_Buffer(np.ascontiguousarray(data).reshape(-1).view(np.uint8)))
        elif self.batch is None:
            tensor.shapeSignature = [-1, *tensor.shape[1:]]
        if rounding is not None:
            zero = rounding.zero - (MIDDLE if kind == "int8" else 0)
            tensor.quantization = _quantized([float(rounding.scale)], [zero], 0)
            self.roundings[name] = rounding
        elif scales is not None:
            tensor.quantization = _quantized(scales, np.zeros(len(scales), np.int64), axis)
        self.tensors[name] = tensor
        return name

    def constant(self, array: np.ndarray, name: str, **quantized: Any) -> str:  # noqa: ANN401 - of several types.
        """Add a constant unless it exists, and return its name.

        Args:
          array: its values.
          name: of the constant.
          quantized: arguments of `tensor`.
        """
        if name in self.tensors:
            return name
        return self.tensor(name, array.shape, str(array.dtype), data=array, **quantized)

    def activation(self, name: str, shape: Sequence[int], *, like: str | None = None) -> str:
        """Add an activation, with quantization in 8 bits, and return its name.

        Args:
          name: of the activation.
          shape: of the activation.
          like: the activation whose range it shares; None gives it its own range.
        """
        if like is None:
            self.activations.append(name)
        self._parents[name] = self._group(like) if like else name
        if self.quantization is None or self.quantization.ranges is None:
            return self.tensor(name, shape, "float32")
        rounding = self.roundings[like] if like else rounding_of(*self.quantization.ranges[name])
        return self.tensor(name, shape, "int8", rounding=rounding)

    def _group(self, name: str) -> str:
        while self._parents[name] != name:
            name = self._parents[name]
        return name

    def groups(self) -> dict[str, str]:
        """Return {activation: the one whose range it shares}."""
        return {name: self._group(name) for name in self.activations}

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor.

        Args:
          name: of the tensor.
        """
        return self.tensors[name].shape

    # Operators

    def operator(
        self, kind: str, inputs: Sequence[str], output: str, options: object = None, *, hybrid: bool = False
    ) -> str:
        """Add an operator between existing tensors, and return the name of its output.

        Args:
          kind: name of the operator.
          inputs: names of its inputs.
          output: name of its output.
          options: of the schema, which has a type for each operator.
          hybrid: whether it has float32 input and 8-bit weights.
        """
        narrow = self.tensors[inputs[0]].type in (KINDS["int8"], KINDS["uint8"]) and self.quantization is not None
        version = HYBRID[kind] if hybrid else VERSIONS.get(kind, 1) if narrow else 1
        operator = schema.OperatorT()
        operator.opcodeIndex = self.codes.setdefault((kind, version), len(self.codes))
        operator.inputs, operator.outputs = list(inputs), [output]
        if options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__[:-1])
            operator.builtinOptions = options
        self.operators.append(operator)
        return output

    def layer(self, x: str, params: Params, name: str, *, stride: int = 1) -> str:
        """Add a convolution and, unless it is a depthwise one, bias and ReLU.

        Args:
          x: name of its input.
          params: {"conv": {"kernel", "bias"}}.
          name: of its output.
          stride: in both directions.
        """
        kernel, bias = (params["conv"].get(leaf) for leaf in ("kernel", "bias"))
        depthwise = bias is None
        height, width = (-(-length // stride) for length in self.shape(x)[1:3])
        x, padding = self._padded(x, kernel.shape[0], stride)
        inputs = x, *self.weights(x, kernel, bias, name, depthwise=depthwise)
        output = self.activation(name, (self.shape(x)[0], height, width, kernel.shape[-1]))
        if depthwise:
            options = schema.DepthwiseConv2DOptionsT(depthMultiplier=1)
        else:
            options = schema.Conv2DOptionsT(fusedActivationFunction=schema.ActivationFunctionType.RELU)
        options.padding, options.strideH, options.strideW = padding, stride, stride
        hybrid = self.tensors[inputs[1]].type == KINDS["int8"] and self.quantization is None
        return self.operator("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", inputs, output, options, hybrid=hybrid)

    def weights(
        self, x: str, kernel: np.ndarray, bias: np.ndarray | None, name: str, *, depthwise: bool = False
    ) -> tuple[str, str]:
        """Add a layer's weights, and return their names.

        Args:
          x: name of the layer's input.
          kernel: (h, w, I, O) or (I, O).
          bias: (O,); None means 0.
          name: of the layer.
          depthwise: whether it is a depthwise convolution.
        """
        kernel = np.moveaxis(np.asarray(kernel, np.float32), -1, 0)
        bias = np.zeros(len(kernel), np.float32) if bias is None else np.asarray(bias, np.float32)

        def arranged(array: np.ndarray) -> np.ndarray:
            return np.moveaxis(array, 0, -1).transpose(2, 0, 1, 3) if depthwise else array

        rounded = self.dynamic and not depthwise and kernel[0].size == kernel.shape[-1]  # A 1x1 convolution.
        if self.quantization is None and not rounded:
            return self.constant(arranged(kernel), f"{name}/kernel"), self.constant(bias, f"{name}/bias")
        unit = self.roundings[x].scale if self.quantization else None
        most = self.quantization.largest_weight if self.quantization else 127
        whole, steps, whole_bias = round_weights(kernel, bias, unit, most)
        named = self.constant(arranged(whole), f"{name}/kernel", scales=steps, axis=3 if depthwise else 0)
        if whole_bias is None or unit is None:
            return named, self.constant(bias, f"{name}/bias")
        return named, self.constant(whole_bias, f"{name}/bias", scales=(unit * steps).astype(np.float32))

    def _padded(self, x: str, size: int, stride: int) -> tuple[str, int]:
        """Return the input of a layer and its padding, so that it pads by 1 on all sides as PyTorch does.

        For even lengths, TFLite's SAME would pad on the other side.
        """
        batch, *lengths, channels = self.shape(x)
        if size == 1 or stride == 1 or all(length % 2 for length in lengths):
            return x, schema.Padding.SAME
        name = f"{x}/padded"
        if name not in self.tensors:
            pads = np.array([[0, 0], *([1, length % 2] for length in lengths), [0, 0]], np.int32)
            shape = batch, *(length + 1 + length % 2 for length in lengths), channels
            inputs = x, self.constant(pads, "pads/" + "_".join(map(str, pads.ravel())))
            self.operator("PAD", inputs, self.activation(name, shape, like=x), schema.PadOptionsT())
        return name, schema.Padding.VALID

    def max_pool(self, x: str, name: str) -> str:
        """Add the stem's pooling.

        Args:
          x: name of its input.
          name: of its output.
        """
        batch, height, width, channels = self.shape(x)
        x, padding = self._padded(x, 3, 2)  # After a ReLU, padding with 0 changes no maximum.
        output = self.activation(name, (batch, -(-height // 2), -(-width // 2), channels), like=x)
        options = schema.Pool2DOptionsT(padding=padding, strideH=2, strideW=2, filterHeight=3, filterWidth=3)
        return self.operator("MAX_POOL_2D", [x], output, options)

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
        ends = channels.start, channels.stop
        bounds = (self.constant(np.array([0, 0, 0, end], np.int32), f"channels/{end}") for end in ends)
        steps = self.constant(np.array([1, 1, 1, channels.step], np.int32), f"steps/{channels.step}")
        output = self.activation(name, (*self.shape(piece.name)[:3], count), like=piece.name)
        options = schema.StridedSliceOptionsT(beginMask=0b0111, endMask=0b0111)
        return Piece(self.operator("STRIDED_SLICE", [piece.name, *bounds, steps], output, options), count)

    def join(self, pieces: list[Piece], name: str) -> str:
        """Add a concatenation of channels.

        Args:
          pieces: in their order.
          name: of its output.
        """
        first = pieces[0].name
        if len(pieces) == 1:
            return first
        while len(pieces) > MOST_JOINED:
            joined = pieces[:MOST_JOINED]
            part = self.join(joined, f"{name}/{len(pieces)}")
            pieces = [Piece(part, sum(piece.channels for piece in joined)), *pieces[MOST_JOINED:]]
            first = part
        for piece in pieces[1:]:  # They share a range, as concatenations of 8 bits must.
            self._parents[self._group(piece.name)] = self._group(first)
        shape = (*self.shape(first)[:3], sum(piece.channels for piece in pieces))
        output = self.activation(name, shape, like=first)
        options = schema.ConcatenationOptionsT(axis=3)
        return self.operator("CONCATENATION", [piece.name for piece in pieces], output, options)

    def reorder(self, x: str, order: np.ndarray, name: str) -> str:
        """Add a permutation of channels.

        Args:
          x: name of its input.
          order: int (C,), for each output channel its input channel.
          name: of its output.
        """
        inputs = x, self.constant(np.asarray(order, np.int32), f"{name}/order")
        options = schema.GatherOptionsT(axis=3)
        return self.operator("GATHER", inputs, self.activation(name, self.shape(x), like=x), options)

    def global_mean(self, x: str, name: str) -> str:
        """Add the mean over all pixels, (B, C).

        Args:
          x: name of its input.
          name: of its output.
        """
        inputs = x, self.constant(np.array([1, 2], np.int32), "pixels")
        shape = self.shape(x)
        return self.operator("MEAN", inputs, self.activation(name, (shape[0], shape[3])), schema.ReducerOptionsT())

    def dense(self, x: str, params: Params, name: str) -> str:
        """Add the classifier.

        Args:
          x: name of its input.
          params: {"kernel", "bias"}.
          name: of its output.
        """
        inputs = x, *self.weights(x, params["kernel"], params.get("bias"), "fc")
        output = self.activation(name, (self.shape(x)[0], params["kernel"].shape[-1]))
        options = schema.FullyConnectedOptionsT(asymmetricQuantizeInputs=self.dynamic)
        return self.operator("FULLY_CONNECTED", inputs, output, options, hybrid=self.dynamic)

    # The file

    def packed(self, outputs: Mapping[str, str], texts: Mapping[str, bytes]) -> bytes:
        """Return the bytes of a file.

        Args:
          outputs: {name of an output: its tensor}.
          texts: {name: metadata}.
        """
        places = {name: place for place, name in enumerate(self.tensors)}
        for operator in self.operators:
            operator.inputs = [places[name] for name in operator.inputs]
            operator.outputs = [places[name] for name in operator.outputs]
        subgraph = schema.SubGraphT(name="main", tensors=list(self.tensors.values()), operators=self.operators)
        subgraph.inputs, subgraph.outputs = [places["images"]], [places[name] for name in outputs.values()]
        signature = schema.SignatureDefT(signatureKey="serving_default", subgraphIndex=0)
        signature.inputs = [schema.TensorMapT(name="images", tensorIndex=places["images"])]
        signature.outputs = [schema.TensorMapT(name=name, tensorIndex=places[n]) for name, n in outputs.items()]
        model = schema.ModelT(version=3, description="shufflenet_jax", subgraphs=[subgraph], signatureDefs=[signature])
        model.operatorCodes = [_code(*code) for code in self.codes]
        model.metadata = []
        for name, content in texts.items():
            model.metadata.append(schema.MetadataT(name=name, buffer=len(self.buffers)))
            self.buffers.append(_Buffer(np.frombuffer(content, np.uint8)))
        model.buffers = self.buffers
        builder = flatbuffers.Builder(sum(0 if b.data is None else b.data.size for b in self.buffers) + 2**20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


class _Buffer(schema.BufferT):
    """A buffer with bytes aligned as the schema requires; Python's code for the schema omits this."""

    def Pack(self, builder: flatbuffers.Builder) -> int:
        """Write the buffer, and return its offset."""
        if self.data is None:
            schema.BufferStart(builder)
            return schema.BufferEnd(builder)
        builder.StartVector(1, self.data.size, 16)
        builder.head -= self.data.size
        builder.Bytes[builder.head : builder.head + self.data.size] = self.data.tobytes()
        content = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, content)
        return schema.BufferEnd(builder)


def _quantized(
    scales: Sequence[float] | np.ndarray, zeros: Sequence[int] | np.ndarray, axis: int
) -> schema.QuantizationParametersT:
    return schema.QuantizationParametersT(
        scale=np.asarray(scales, np.float32), zeroPoint=np.asarray(zeros, np.int64), quantizedDimension=axis
    )


def _code(kind: str, version: int) -> schema.OperatorCodeT:
    number = getattr(schema.BuiltinOperator, kind)
    return schema.OperatorCodeT(deprecatedBuiltinCode=min(number, 127), builtinCode=number, version=version)


def _normalized(graph: Graph, preprocess: Preprocess) -> str:
    """Add the normalization of uint8 images as a depthwise convolution; channels stay in RGB order."""
    mean, std = (np.asarray(values, np.float64) for values in (preprocess.mean, preprocess.std))
    if preprocess.channel_order == "BGR":
        mean, std = mean[::-1], std[::-1]
    shape = graph.shape("images")
    if graph.quantization and graph.quantization.ranges:
        x = graph.tensor("images/whole", shape, "int8", rounding=PIXELS)
        graph.operator("QUANTIZE", ["images"], x)
        ranges = graph.quantization.ranges  # Those of a graph that takes normalized images.
        graph.quantization = graph.quantization._replace(ranges={**ranges, "images/normalized": ranges["images"]})
    else:
        x = graph.tensor("images/float", shape, "float32")
        graph.operator("CAST", ["images"], x, schema.CastOptionsT(KINDS["uint8"], KINDS["float32"]))
    kernel = (preprocess.scale / std)[None, None, None]
    inputs = x, *graph.weights(x, kernel, -mean / std, "images/normalized", depthwise=True)
    options = schema.DepthwiseConv2DOptionsT(padding=schema.Padding.SAME, strideH=1, strideW=1, depthMultiplier=1)
    return graph.operator("DEPTHWISE_CONV_2D", inputs, graph.activation("images/normalized", shape), options)
