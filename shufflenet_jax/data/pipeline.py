"""The order in which examples are read, and batches of them, decoded by Grain's threads while the device computes.

Every order is a pure function of the seed and the position: nothing needs to be stored to continue a run.
"""

import os

import grain
import numpy as np

from . import transforms


def eval_batches(source, preprocess, *, batch_size, limit=None, threads=None):
    """All examples once, in order, in batches of one size: the last is filled up with rows whose mask is 0.

    Args:
      source: a Source.
      preprocess: a Preprocess.
      batch_size: rows of a batch.
      limit: read only that many examples.
      threads: decoding threads; by default one for each core.
    Returns:
      An iterable of {"images": uint8 (B, H, W, C), "labels": int32 (B,), "mask": float32 (B,), "names": str (B,)}.
    """
    count = len(source) if limit is None else min(limit, len(source))

    def load(position):
        if position >= count:
            empty = np.zeros((preprocess.crop, preprocess.crop, preprocess.channels), np.uint8)
            return {"images": empty, "labels": np.int32(0), "mask": np.float32(0), "names": ""}
        example = source[position]
        image = transforms.prepare(example.image, preprocess, example.name)
        return {"images": image, "labels": np.int32(example.label), "mask": np.float32(1), "names": example.name}

    steps = -(-count // batch_size)
    return _batches(grain.MapDataset.range(steps * batch_size).map(load), batch_size, threads)


def train_batches(source, preprocess, *, batch_size, seed, shift=0, start_step=0, stop_step, threads=None):
    """The batches of steps start_step .. stop_step - 1. Every pass over the data has an order of its own.

    Returns:
      An iterable of {"images": uint8 (B, H, W, C), "labels": int32 (B,)}.
    """

    def load(example, rng):
        image = transforms.prepare(example.image, preprocess, example.name)
        if shift:
            image = transforms.random_shift(image, rng, shift)
        return {"images": image, "labels": np.int32(example.label)}

    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(load)
    return _batches(examples[start_step * batch_size : stop_step * batch_size], batch_size, threads)


def _batches(examples, batch_size, threads):
    """Batches of a MapDataset; a thread makes a whole batch, and some are ready before they are asked for."""
    threads = threads or os.cpu_count()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return examples.batch(batch_size).to_iter_dataset(options)
