"""A trained network as a .tflite file, written operator by operator: batch norm folded, no shuffles, channels last.

The schema of the file is the one that LiteRT ships. A converter from StableHLO exists (litert-converter), but its
interface is undocumented, and it knows no ranges for 8 bits.
"""

import json
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ..deploy import arrange, fold
from ..inference import Model
from .network import Piece, Signature, add_network, outputs_of
from .quantization import Quantization, Rounding, round_weights, rounding_of
from .tflite_metadata import METADATA_NAME, described, with_labels

KINDS = {"float32": schema.TensorType.FLOAT32, "int32": schema.TensorType.INT32, "int64": schema.TensorType.INT64}
KINDS |= {"uint8": schema.TensorType.UINT8, "int8": schema.TensorType.INT8}
# The least version of an operator whose input is 8 bits; of float32 it is 1. Older runtimes refuse what they lack.
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "QUANTIZE": 2}
VERSIONS |= dict.fromkeys(["MAX_POOL_2D", "MEAN", "PAD", "CONCATENATION", "STRIDED_SLICE", "GATHER"], 2)
HYBRID = {"CONV_2D": 5, "FULLY_CONNECTED": 12}  # Those whose input is float32, and whose weights are 8 bits.
PIXELS = Rounding(np.float32(1), 0)  # uint8 as it is.
MIDDLE = 128  # What int8 is below uint8.
MOST_JOINED = 5  # XNNPACK, which computes nearly all, leaves larger concatenations to slower code.
OWN = "shufflenet_jax"  # The name of our own metadata: model.json.


class Written(NamedTuple):
    """A .tflite file."""

    content: bytes
    activations: list[str]  # Those that 8 bits need ranges of.
    groups: dict[str, str]  # {activation: the one whose range it shares}: what is concatenated has one range.


def make_model(
    model: Model,
    signature: Signature,
    *,
    quantization: Quantization | None = None,
    watched: bool = False,
    metadata: dict[str, str] | None = None,
    labels: dict[str, list[str]] | None = None,
) -> Written:
    """Write a network as a .tflite file.

    Args:
      model: the network, its weights, and how its images are normalized.
      signature: what it takes, `images`, uint8 or float32 (batch, height, width, C), and puts out: `outputs_of`. A
        batch of None is written as 1, which the runtime may resize.
      quantization: with ranges, all is in 8 bits, also what goes in and out; without, the weights of 1x1 convolutions
        and of the classifier, which round their inputs as they come. None computes in float32.
      watched: put out all activations, for `calibrate`.
      metadata: {name: JSON text} to keep in it.
      labels: {file name: a line each class} to keep in it.
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
    """Operators and tensors as they are added. An operator has the name of its output."""

    def __init__(self, quantization: Quantization | None, *, batch: int | None) -> None:
        self.dynamic = quantization is not None and quantization.ranges is None
        self.quantization, self.batch = None if self.dynamic else quantization, batch
        self.tensors: dict[str, Any] = {}
        self.buffers = [_Buffer()]  # The first one stands for none.
        self.codes: dict[tuple[str, int], int] = {}
        self.operators: list[Any] = []
        self.activations: list[str] = []
        self.roundings: dict[str, Rounding] = {}
        self._parents: dict[str, str] = {}

    # Tensors

    def tensor(self, name, shape, kind, *, rounding=None, scales=None, axis=0, data=None):
        """Add a tensor; of `data` a constant."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.hasRank = name, list(map(int, shape)), KINDS[kind], True
        if data is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(_Buffer(np.ascontiguousarray(data).reshape(-1).view(np.uint8)))
        elif self.batch is None:
            tensor.shapeSignature = [-1, *tensor.shape[1:]]
        if rounding is not None:
            zero = rounding.zero - (MIDDLE if kind == "int8" else 0)
            tensor.quantization = _quantized([rounding.scale], [zero], 0)
            self.roundings[name] = rounding
        elif scales is not None:
            tensor.quantization = _quantized(scales, np.zeros(len(scales), np.int64), axis)
        self.tensors[name] = tensor
        return name

    def constant(self, array, name, **quantized):
        if name in self.tensors:
            return name
        return self.tensor(name, array.shape, str(array.dtype), data=array, **quantized)

    def activation(self, name, shape, *, like=None):
        """Add an activation: with quantization in 8 bits, of the range that it shares with another or of its own."""
        if like is None:
            self.activations.append(name)
        self._parents[name] = self._group(like) if like else name
        if self.quantization is None:
            return self.tensor(name, shape, "float32")
        rounding = self.roundings[like] if like else rounding_of(*self.quantization.ranges[name])
        return self.tensor(name, shape, "int8", rounding=rounding)

    def _group(self, name):
        while self._parents[name] != name:
            name = self._parents[name]
        return name

    def groups(self):
        return {name: self._group(name) for name in self.activations}

    def shape(self, name):
        return self.tensors[name].shape

    # Operators

    def operator(self, kind, inputs, output, options=None, *, hybrid=False):
        """Add an operator between tensors that are there already."""
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

    def layer(self, x, params, name, *, stride=1):
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

    def weights(self, x, kernel, bias, name, *, depthwise=False):
        """The names of a layer's kernel (h, w, I, O) or (I, O) and bias, which is 0 where it is None."""
        kernel = np.moveaxis(np.asarray(kernel, np.float32), -1, 0)
        bias = np.zeros(len(kernel), np.float32) if bias is None else np.asarray(bias, np.float32)

        def arranged(array):
            return np.moveaxis(array, 0, -1).transpose(2, 0, 1, 3) if depthwise else array

        rounded = self.dynamic and not depthwise and kernel[0].size == kernel.shape[-1]  # A 1x1 convolution.
        if self.quantization is None and not rounded:
            return self.constant(arranged(kernel), f"{name}/kernel"), self.constant(bias, f"{name}/bias")
        unit = self.roundings[x].scale if self.quantization else None
        most = self.quantization.largest_weight if self.quantization else 127
        whole, steps, whole_bias = round_weights(kernel, bias, unit, most)
        named = self.constant(arranged(whole), f"{name}/kernel", scales=steps, axis=3 if depthwise else 0)
        if whole_bias is None:
            return named, self.constant(bias, f"{name}/bias")
        return named, self.constant(whole_bias, f"{name}/bias", scales=(unit * steps).astype(np.float32))

    def _padded(self, x, size, stride):
        """(what the layer takes, its padding) where PyTorch's pads by 1 on all sides: of even lengths TFLite's SAME
        would be on the other side."""
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

    def max_pool(self, x, name):
        batch, height, width, channels = self.shape(x)
        x, padding = self._padded(x, 3, 2)  # Zeros are as good as none, after a ReLU.
        output = self.activation(name, (batch, -(-height // 2), -(-width // 2), channels), like=x)
        options = schema.Pool2DOptionsT(padding=padding, strideH=2, strideW=2, filterHeight=3, filterWidth=3)
        return self.operator("MAX_POOL_2D", [x], output, options)

    def cut(self, piece, channels, name):
        count = len(range(*channels.indices(piece.channels)))
        if count == piece.channels:
            return piece
        ends = channels.start, channels.stop
        bounds = (self.constant(np.array([0, 0, 0, end], np.int32), f"channels/{end}") for end in ends)
        steps = self.constant(np.array([1, 1, 1, channels.step], np.int32), f"steps/{channels.step}")
        output = self.activation(name, (*self.shape(piece.name)[:3], count), like=piece.name)
        options = schema.StridedSliceOptionsT(beginMask=0b0111, endMask=0b0111)
        return Piece(self.operator("STRIDED_SLICE", [piece.name, *bounds, steps], output, options), count)

    def join(self, pieces, name):
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

    def reorder(self, x, order, name):
        inputs = x, self.constant(np.asarray(order, np.int32), f"{name}/order")
        options = schema.GatherOptionsT(axis=3)
        return self.operator("GATHER", inputs, self.activation(name, self.shape(x), like=x), options)

    def global_mean(self, x, name):
        inputs = x, self.constant(np.array([1, 2], np.int32), "pixels")
        shape = self.shape(x)
        return self.operator("MEAN", inputs, self.activation(name, (shape[0], shape[3])), schema.ReducerOptionsT())

    def dense(self, x, params, name):
        inputs = x, *self.weights(x, params["kernel"], params.get("bias"), "fc")
        output = self.activation(name, (self.shape(x)[0], params["kernel"].shape[-1]))
        options = schema.FullyConnectedOptionsT(asymmetricQuantizeInputs=self.dynamic)
        return self.operator("FULLY_CONNECTED", inputs, output, options, hybrid=self.dynamic)

    # The file

    def packed(self, outputs, texts):
        """The bytes of a file with outputs {their names for people: tensors} and metadata {name: bytes}."""
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
    """A buffer whose bytes are aligned as the schema wants them, which Python's code for it leaves out."""

    def Pack(self, builder):
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


def _quantized(scales, zeros, axis):
    return schema.QuantizationParametersT(
        scale=np.asarray(scales, np.float32), zeroPoint=np.asarray(zeros, np.int64), quantizedDimension=axis
    )


def _code(kind, version):
    number = getattr(schema.BuiltinOperator, kind)
    return schema.OperatorCodeT(deprecatedBuiltinCode=min(number, 127), builtinCode=number, version=version)


def _normalized(graph, preprocess):
    """`normalization.normalize` of the uint8 images, a depthwise convolution; channels stay in RGB order."""
    mean, std = (np.asarray(values, np.float64) for values in (preprocess.mean, preprocess.std))
    if preprocess.channel_order == "BGR":
        mean, std = mean[::-1], std[::-1]
    shape = graph.shape("images")
    if graph.quantization:
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
