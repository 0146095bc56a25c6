"""tf.data's part of input_pipeline.py, for a Python with TensorFlow: prints its images per second on one core."""

import json
import os
import sys
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf


def main(home: Path, seconds: float) -> None:
    """Measure, and print the rate.

    Args:
      home: folder of a data set.
      seconds: measured time.
    """
    path = home / "images.tfrecord"
    if not path.exists():
        with tf.io.TFRecordWriter(str(path)) as writer:
            for file in sorted((home / "files").rglob("*.*")):
                if file.is_file():
                    writer.write(file.read_bytes())
    threads = len(os.sched_getaffinity(0))
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    batches = (
        tf.data.TFRecordDataset(str(path))
        .cache()
        .repeat()
        .map(crop, num_parallel_calls=threads)
        .batch(64)
        .prefetch(2)
        .with_options(options)
        .as_numpy_iterator()
    )
    for _ in range(4):
        next(batches)
    start, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        images += len(next(batches))
    print(json.dumps({"images_per_second": images / elapsed}))


def crop(data: tf.Tensor) -> tf.Tensor:
    """Apply RandomResizedCrop with TensorFlow's operations: decode only the crop, scale it and flip it.

    Not `sample_distorted_bounding_box`, whose crops are smaller (its heights are uniform, MMPretrain's areas are): the
    work must be the same.

    Args:
      data: an encoded JPEG.

    Returns:
      uint8 (224, 224, 3).
    """
    shape = tf.io.extract_jpeg_shape(data)[:2]
    area = tf.random.uniform((10,), 0.08, 1) * tf.cast(tf.reduce_prod(shape), tf.float32)
    ratio = tf.exp(tf.random.uniform((10,), tf.math.log(3 / 4), tf.math.log(4 / 3)))
    sizes = tf.cast(tf.round(tf.sqrt(tf.stack([area / ratio, area * ratio], axis=1))), tf.int32)
    sizes = tf.boolean_mask(sizes, tf.reduce_all(sizes <= shape, axis=1))
    size = sizes[0] if tf.shape(sizes)[0] > 0 else tf.minimum(shape[0], shape[1]) * tf.constant([1, 1])
    begin = tf.cast(tf.random.uniform((2,)) * tf.cast(shape - size + 1, tf.float32), tf.int32)
    image = tf.image.decode_and_crop_jpeg(data, tf.concat([begin, size], axis=0), channels=3)
    image = tf.image.resize(image, (224, 224))
    return tf.cast(tf.image.random_flip_left_right(image), tf.uint8)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
