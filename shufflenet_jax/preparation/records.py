"""The records of a data set: images as TFDS examples, and unchanged TFRecords. Needs no TensorFlow."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from ..data import decoding
from ..data.inventory import Entry
from ..data.jpeg import ORIENTATION
from ..errors import InputError
from ..files import printable


@dataclass(frozen=True)
class StoreOptions:
    """How to store images.

    Attributes:
      short_edge: shrink images with a longer short side than this, in pixels; None stores all files as they are.
      quality: JPEG quality of the images that are shrunk.
      skip_damaged: skip images that cannot be decoded, instead of raising an error.
      shard_size: number of images per file; 1024 images of ImageNet take 100 to 150 MB.
    """

    short_edge: int | None = None
    quality: int = 90
    skip_damaged: bool = False
    shard_size: int = 1024


def features_for(classes: Iterable[str] | int) -> tfds.features.FeaturesDict:
    """Return the features of a data set of labeled images, which are those of TFDS's imagenet2012.

    Args:
      classes: name of each label, or the number of labels.
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
    """Shrink an image to a short side and encode it as JPEG. Keep its EXIF orientation.

    Args:
      data: the encoded image.
      short_edge: the short side, in pixels. Images with a shorter one remain unchanged.
      quality: JPEG quality.
      name: name of the image, for errors.

    Raises:
      InputError: the image is damaged.
    """
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
    # A restart marker after each block costs 4 % more bytes, and lets training decode only the blocks of its crop.
    resized.save(buffer, "JPEG", quality=quality, exif=exif if exif else b"", restart_marker_blocks=1)
    return buffer.getvalue()


def stored_bytes(entry: Entry, options: StoreOptions) -> bytes:
    """Return the encoded image that the data set stores.

    Args:
      entry: the image.
      options: how to store it.

    Raises:
      InputError: the image is damaged.
    """
    data = entry.location.read()
    if options.short_edge is None:
        decoding.read(data, "pillow", entry.name)
        return data
    return shrink(data, options.short_edge, options.quality, entry.name)


def image_records(
    entries: Iterable[Entry], classes: tuple[str, ...] | int, options: StoreOptions, damaged: list[str]
) -> Iterator[bytes]:
    """Yield a serialized example for each image.

    Args:
      entries: the images.
      classes: name of each label, or the number of labels.
      options: how to store the images.
      damaged: receives the reason for each image that is skipped.

    Raises:
      InputError: an image is damaged and must not be skipped.
    """
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
        # Without `deterministic` the order of a protocol buffer's map differs between processes.
        yield tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


def tfrecords(path: Path) -> Iterator[bytes]:
    """Yield the unchanged records of a TFRecord file.

    Raises:
      InputError: a checksum of the file does not match.
    """

    def checked(data: bytes, checksum: bytes) -> bytes:
        crc = google_crc32c.value(data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if len(checksum) != 4 or masked != int.from_bytes(checksum, "little"):
            raise InputError(f"{path} is damaged: a checksum does not match; fetch it again")
        return data

    with open(path, "rb") as file:
        while header := file.read(8):
            size = int.from_bytes(checked(header, file.read(4)), "little")
            yield checked(file.read(size), file.read(4))
