"""The order in which examples are read, and batches of them, decoded by Grain's threads or worker processes.

Every order is a pure function of the seed and the position: nothing needs to be stored to continue a run, and any
number of hosts, workers and threads sees the same global batches.
"""

import functools

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from ..batch_groups import Epoch, plan_batch
from ..errors import InputError
from . import augmentation, decoding, geometry
from .sources import Example
from .workers import usable_cores

KEPT_BYTES = 2**28  # A training keeps decoded images, in each process that decodes, of data that fill no more memory.


def eval_batches(source, preprocess, *, batch_size, limit=None, host=0, hosts=1, workers=0, threads=None):
    """All examples once, in order, in batches of one size: the last is filled up with rows whose mask is 0.

    Args:
      source: a Source.
      preprocess: a Preprocess.
      batch_size: rows of a batch over all hosts; a multiple of their number.
      limit: read only that many examples.
      host, hosts: which slice of each batch to read: rows host * b .. (host + 1) * b - 1, where b = batch_size / hosts.
      workers: processes that decode; 0 decodes in threads of this one.
      threads: decoding threads, of each worker if there are any; by default one for each core.
    Returns:
      An iterable of {"images": uint8 (b, H, W, C), "labels": int32 (b,) or (b, K), "mask": float32 (b,), "names":
      str (b,)}.
    """
    count = len(source) if limit is None else min(limit, len(source))

    def load(position):
        if position >= count:
            empty = np.zeros((preprocess.crop, preprocess.crop, preprocess.channels), np.uint8)
            nothing = np.zeros(source.label_shape, np.int32)
            return {"images": empty, "labels": nothing, "mask": np.float32(0), "names": ""}
        example = source[position]
        image = geometry.prepare(example.image, preprocess, example.name)
        return {"images": image, "labels": np.int32(example.label), "mask": np.float32(1), "names": example.name}

    rows = _host_rows(batch_size, 0, -(-count // batch_size), host, hosts)
    return _batches(rows.map(load), batch_size // hosts, workers, threads)


def train_batches(
    source, config, plan=None, *, start_step=0, stop_step, host=0, hosts=1, workers=0, threads=None, stored=None
):
    """The batches of steps start_step .. stop_step - 1. Every pass over the data has an order of its own.

    Each row is a pure function of the seed and its position in the run. A damaged image is replaced by the next sound
    one of the data, prepared with the same random numbers; nothing else changes. Small images are decoded once.

    Args:
      source: a Source.
      config: a TrainConfig: batch size, seed, preprocessing and augmentation.
      plan: the BatchPlan of a batch; by default that of a single device.
      host, hosts, workers, threads: as in `eval_batches`; a host reads its slice of each part of a batch.
      stored: a teacher's Predictions of the examples.
    Returns:
      An iterable of {"images": uint8 (b, H, W, C), "labels": int32 (b,), "flip": bool (b,), "erase": int32 (b, 4) with
      top, left, height and width of a rectangle, "damaged": str (b,)}; the last names the image that had to be
      replaced, or is empty. The last batch of a pass that is not full also has "mask": float32 (b,), 0 for padding;
      with stored logits there is "teacher": (b, num_classes).
    Raises:
      InputError: no image can be read, or stored logits belong to other examples.
    """
    plan = plan or plan_batch(config.batch_size, config.bn_group_size, 1, parts=1)
    size, preprocess, whole = len(source), config.train_preprocess, Epoch(len(source), plan)
    # The fast crop decodes no more than it needs.
    examples = source if config.crop == "random" and config.transform == "fast" else _Decoded(source, preprocess)

    def readable(index, seed):
        """(index, row) of the first sound image from an index on."""
        damaged = ""
        for found in (i % size for i in range(index, index + size)):
            try:
                example = examples[found]
                # A new generator for each try: what a damaged image has drawn must not matter.
                row = augmentation.training_row(example, config, preprocess, np.random.default_rng(seed))
                return found, {**row, "labels": np.int32(example.label), "damaged": damaged}
            except InputError as error:
                damaged = damaged or str(error)
        raise InputError(f"no image of the training data can be read; the first: {damaged}")

    def load(position):
        epoch, place, real = whole.find(*divmod(position, plan.batch_size))
        index = shuffled(place % size // config.aug_repeats, size, config.seed, epoch)
        index, row = readable(index, seed=(config.seed, epoch * whole.padded + place))
        if stored:
            if stored.label[index] != row["labels"]:
                raise InputError(f"the teacher's predictions belong to other data: example {index} has another label")
            row["teacher"] = stored.logits[index]
        return row if real is None else {**row, "mask": np.float32(real)}

    part, parts = plan.batch_size // plan.parts, plan.parts
    rows = _host_rows(part, start_step * parts, stop_step * parts, host, hosts)
    return _batches(rows.map(load), plan.batch_size // hosts, workers, threads)


def blank_row(config):
    """Return a row of `train_batches` as a TrainConfig asks for it, of a black image: its names, shapes and types."""
    preprocess = config.train_preprocess
    blank = np.zeros((preprocess.resize, preprocess.resize, 3), np.uint8)
    row = augmentation.training_row(Example("blank", blank, 0), config, preprocess, np.random.default_rng(0))
    return {**row, "labels": np.int32(0)}


class _Decoded:
    """Examples of a source with their images decoded, and kept where all the data would fit in KEPT_BYTES like that."""

    def __init__(self, source, preprocess):
        self._source, self._preprocess, self._kept = source, preprocess, {}

    def __getitem__(self, index):
        found = self._kept.get(index)
        if found is None:
            found = self._source[index]
            if isinstance(found.image, bytes):
                pixels = decoding.decode(found.image, self._preprocess.decoder, found.name)
                found = found._replace(image=pixels)
                if pixels.nbytes * len(self._source) <= KEPT_BYTES:
                    self._kept[index] = found
        return found


def shuffled(place, size, seed, epoch):
    """What comes at a place of a pass over `size` examples: a permutation computed place by place, never stored."""
    return index_shuffle(place, max_index=size - 1, seed=_epoch_seed(seed, epoch), rounds=8)


@functools.lru_cache(8)
def _epoch_seed(seed, epoch):
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _host_rows(batch_size, start, stop, host, hosts):
    """The positions that one host reads: its slice of the batches start .. stop - 1, in order."""
    rows, rest = divmod(batch_size, hosts)
    if rest:
        raise InputError(f"batch_size is {batch_size}, but must be a multiple of the {hosts} hosts")

    def position(row):
        step, place = divmod(row, rows)
        return step * batch_size + host * rows + place

    return grain.MapDataset.range(start * rows, stop * rows).map(position)


def _batches(examples, batch_size, workers, threads):
    """Batches of a MapDataset; a thread makes a whole batch, and some are ready before they are asked for."""
    threads = threads or usable_cores()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = examples.batch(batch_size).to_iter_dataset(options)
    if not workers:
        return batches
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks absl's flags when it starts workers; nobody here parses any.
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
