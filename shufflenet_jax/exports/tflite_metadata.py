"""The metadata of a .tflite file for MediaPipe and Android's tools: preprocessing and names of classes.

The format is TensorFlow Lite Metadata (metadata_schema.fbs, "M001"): a FlatBuffer in the model, and files in a zip
after it.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence

import flatbuffers
import numpy as np

from ..config import Preprocess

Field = tuple[str, int, int]  # Its kind, slot and value.

METADATA_NAME = "TFLITE_METADATA"  # The name that readers look for.
IMAGE_PROPERTIES, NORMALIZATION = 2, 1  # Members of the schema's unions.
COLORS = {"RGB": 1, "L": 2}  # The schema lacks BGR, and its readers refuse it.
AXIS_LABELS = 2  # The type of a file with a line for each class.
DATE = (1980, 1, 1, 0, 0, 0)  # Of the files, so that the same network has the same bytes.


def described(
    preprocess: Preprocess, output: str, labels: Mapping[str, Sequence[str]], *, with_preprocessing: bool
) -> bytes:
    """Return the metadata of a network.

    Args:
      preprocess: how to prepare images.
      output: name of its output.
      labels: {file name: a line for each class}; the first file has the classes' own names, others English ones.
      with_preprocessing: whether the file itself normalizes.
    """
    builder = flatbuffers.Builder(1024)
    color = 1 if with_preprocessing and preprocess.channels == 3 else COLORS.get(preprocess.channel_order, 0)
    image = _table(builder, [("byte", 0, color)])
    content = _table(builder, [("byte", 0, IMAGE_PROPERTIES), ("offset", 1, image)])
    # For pixels from 0 to 255: the schema has no scale.
    mean, std = ([value / preprocess.scale for value in values] for values in (preprocess.mean, preprocess.std))
    if with_preprocessing:
        mean, std = [0.0], [1.0]
    pair = [(0, _floats(builder, mean)), (1, _floats(builder, std))]
    options = _table(builder, [("offset", *field) for field in pair])
    unit = _table(builder, [("byte", 0, NORMALIZATION), ("offset", 1, options)])
    pair = [(0, _floats(builder, [255.0])), (1, _floats(builder, [0.0]))]
    ends = _table(builder, [("offset", *field) for field in pair])
    name = builder.CreateString("images")
    fields = [(0, name), (3, content), (4, _vector(builder, [unit])), (5, ends)]
    images = _table(builder, [("offset", *field) for field in fields])
    files = []
    for number, file in enumerate(labels):
        entries: list[Field] = [("offset", 0, builder.CreateString(file)), ("byte", 2, AXIS_LABELS)]
        entries += [("offset", 3, builder.CreateString("en"))] if number else []
        files.append(_table(builder, entries))
    fields = [(0, builder.CreateString(output)), *([(6, _vector(builder, files))] if files else [])]
    outputs = _table(builder, [("offset", *field) for field in fields])
    subgraph = _table(builder, [("offset", 2, _vector(builder, [images])), ("offset", 3, _vector(builder, [outputs]))])
    texts = [(0, "ShuffleNetV2"), (7, "1.0.0")]  # The second is the least version of a parser for all these fields.
    fields = [(slot, builder.CreateString(text)) for slot, text in texts] + [(3, _vector(builder, [subgraph]))]
    builder.Finish(_table(builder, [("offset", *field) for field in fields]), b"M001")
    return bytes(builder.Output())


def with_labels(content: bytes, labels: Mapping[str, Sequence[str]]) -> bytes:
    """Append a zip of label files to a model, which runtimes ignore.

    Args:
      content: bytes of the model.
      labels: {file name: lines}.
    """
    if not labels:
        return content
    # Offsets count from the beginning of the zip, wherever it is in the file.
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, lines in labels.items():
            archive.writestr(zipfile.ZipInfo(name, DATE), "\n".join(lines))
    return content + file.getvalue()


def _table(builder: flatbuffers.Builder, fields: Sequence[Field]) -> int:
    """Write a table of fields."""
    builder.StartObject(max(slot for _, slot, _ in fields) + 1)
    for kind, slot, value in fields:
        if kind == "byte":
            builder.PrependUint8Slot(slot, value, 0)
        else:
            builder.PrependUOffsetTRelativeSlot(slot, value, 0)
    return builder.EndObject()


def _vector(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


def _floats(builder: flatbuffers.Builder, values: Sequence[float]) -> int:
    return builder.CreateNumpyVector(np.asarray(values, np.float32))
