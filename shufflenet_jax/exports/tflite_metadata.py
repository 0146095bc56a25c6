"""What MediaPipe and Android's tools read beside a .tflite file's network: preprocessing and names of classes.

The format is TensorFlow Lite Metadata (metadata_schema.fbs, "M001"): a FlatBuffer in the model, and files in a zip
behind it.
"""

import io
import zipfile

import flatbuffers
import numpy as np

METADATA_NAME = "TFLITE_METADATA"  # Under which readers look for it.
IMAGE_PROPERTIES, NORMALIZATION = 2, 1  # Members of the schema's unions.
COLORS = {"RGB": 1, "L": 2}  # BGR is unknown to the schema: its readers refuse it.
AXIS_LABELS = 2  # The kind of a file with a line for each class.
DATE = (1980, 1, 1, 0, 0, 0)  # Of the files: the same network is the same bytes.


def described(preprocess, output, labels, *, with_preprocessing):
    """The metadata of a network, as bytes.

    Args:
      preprocess: its Preprocess.
      output: the name of its output.
      labels: {file name: a line each class}; the first ones are the classes' own names, others their English ones.
      with_preprocessing: whether the file itself normalizes.
    """
    builder = flatbuffers.Builder(1024)
    color = 1 if with_preprocessing and preprocess.channels == 3 else COLORS.get(preprocess.channel_order, 0)
    image = _table(builder, [("byte", 0, color)])
    content = _table(builder, [("byte", 0, IMAGE_PROPERTIES), ("offset", 1, image)])
    # Of the pixels from 0 to 255: the schema knows no scale.
    mean, std = ([value / preprocess.scale for value in values] for values in (preprocess.mean, preprocess.std))
    if with_preprocessing:
        mean, std = [0.0], [1.0]
    options = _table(builder, [("offset", 0, _floats(builder, mean)), ("offset", 1, _floats(builder, std))])
    unit = _table(builder, [("byte", 0, NORMALIZATION), ("offset", 1, options)])
    ends = _table(builder, [("offset", 0, _floats(builder, [255.0])), ("offset", 1, _floats(builder, [0.0]))])
    name = builder.CreateString("images")
    fields = [(0, name), (3, content), (4, _vector(builder, [unit])), (5, ends)]
    images = _table(builder, [("offset", *field) for field in fields])
    files = []
    for number, file in enumerate(labels):
        fields = [("offset", 0, builder.CreateString(file)), ("byte", 2, AXIS_LABELS)]
        fields += [("offset", 3, builder.CreateString("en"))] if number else []
        files.append(_table(builder, fields))
    fields = [(0, builder.CreateString(output)), *([(6, _vector(builder, files))] if files else [])]
    outputs = _table(builder, [("offset", *field) for field in fields])
    subgraph = _table(builder, [("offset", 2, _vector(builder, [images])), ("offset", 3, _vector(builder, [outputs]))])
    texts = [(0, "ShuffleNetV2"), (7, "1.0.0")]  # The second is the least version of a parser that knows all this.
    fields = [(slot, builder.CreateString(text)) for slot, text in texts] + [(3, _vector(builder, [subgraph]))]
    builder.Finish(_table(builder, [("offset", *field) for field in fields]), b"M001")
    return bytes(builder.Output())


def with_labels(content, labels):
    """A model's bytes with a zip of {file name: lines} behind them, which runtimes ignore."""
    if not labels:
        return content
    # Readers count from the beginning of the zip, wherever it lies in the file.
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, lines in labels.items():
            archive.writestr(zipfile.ZipInfo(name, DATE), "\n".join(lines))
    return content + file.getvalue()


def _table(builder, fields):
    """A table of fields (kind, slot, value)."""
    builder.StartObject(max(slot for _, slot, _ in fields) + 1)
    for kind, slot, value in fields:
        if kind == "byte":
            builder.PrependUint8Slot(slot, value, 0)
        else:
            builder.PrependUOffsetTRelativeSlot(slot, value, 0)
    return builder.EndObject()


def _vector(builder, offsets):
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


def _floats(builder, values):
    return builder.CreateNumpyVector(np.asarray(values, np.float32))
