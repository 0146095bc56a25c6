"""The records of a data set: images as TFDS's examples, and TFRecords as they are; TensorFlow is not needed."""

import io
from dataclasses import dataclass

import google_crc32c
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from ..data import decoding
from ..data.jpeg import ORIENTATION
from ..errors import InputError
from ..files import printable


@dataclass(frozen=True)
class StoreOptions:
    """What changes the result beside the source."""

    short_edge: int | None = None  # Store images with at most this short side, in pixels.
    quality: int = 90  # JPEG quality of images that are stored smaller.
    skip_damaged: bool = False  # Leave out what cannot be decoded, instead of stopping.
    shard_size: int = 1024  # Images a file; 100 to 150 MB of ImageNet.


def features_for(classes):
    """Return the features of a data set of labelled images, those of TFDS's imagenet2012.

    Args:
      classes: the names of the labels, or their number.
    """
    labels = {"num_classes": classes} if isinstance(classes, int) else {"names": list(classes)}
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(**labels),
            "file_name": tfds.features.Text(),
        }
    )


def shrink(data: bytes, short_edge: int, quality: int, name: str) -> bytes:
    """Return an image as JPEG with at most that short side; smaller ones stay as they are. Keeps EXIF's orientation."""
    stored = decoding.read(data, "pillow", name)
    height, width = stored.pixels.shape[:2]
    short = min(height, width)
    if short <= short_edge:
        return data
    size = [short_edge if side == short else int(short_edge * side / short) for side in (width, height)]
    exif = Image.Exif()
    if stored.orientation != 1:
        exif[ORIENTATION] = stored.orientation
    buffer = io.BytesIO()
    resized = Image.fromarray(stored.pixels).resize(size, Image.Resampling.BILINEAR)
    # Each block for itself costs 4 % more bytes, and training then decodes those of its crop alone.
    resized.save(buffer, "JPEG", quality=quality, exif=exif if exif else b"", restart_marker_blocks=1)
    return buffer.getvalue()


def stored_bytes(entry, options):
    """What the data set keeps of an image. Raises InputError when it is damaged."""
    data = entry.location.read()
    if options.short_edge is None:
        decoding.read(data, "pillow", entry.name)
        return data
    return shrink(data, options.short_edge, options.quality, entry.name)


def image_records(entries, classes, options, damaged):
    """Serialised examples of images; names of damaged ones go to a list if they may be skipped."""
    features = features_for(classes)
    for entry in entries:
        try:
            data = stored_bytes(entry, options)
        except InputError as error:
            if not options.skip_damaged:
                raise InputError(f"{error}, or set `skip_damaged`") from error
            damaged.append(str(error))
            continue
        name = printable(entry.name)
        record = features.serialize_example({"image": io.BytesIO(data), "label": entry.label, "file_name": name})
        # The order of a protocol buffer's map is another one in each process, unless it is asked for.
        yield tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


def tfrecords(path):
    """The records of a TFRecord file as they are; both checksums of each are verified."""

    def checked(data, checksum):
        crc = google_crc32c.value(data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if len(checksum) != 4 or masked != int.from_bytes(checksum, "little"):
            raise InputError(f"{path} is damaged: a checksum does not fit; fetch it again")
        return data

    with open(path, "rb") as file:
        while header := file.read(8):
            size = int.from_bytes(checked(header, file.read(4)), "little")
            yield checked(file.read(size), file.read(4))
