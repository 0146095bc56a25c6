"""The order of examples, and their batches, which Grain's threads or worker processes decode.

Every order is a pure function of the seed and the position. Resuming a run therefore needs no stored state, and any
number of hosts, workers and threads sees the same global batches.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from ..batch_groups import BatchPlan, Epoch, plan_batch
from ..config import BALANCED, Preprocess, TrainConfig
from ..errors import InputError
from . import augmentation, decoding, geometry
from .sources import Example, Source
from .workers import usable_cores

Row = dict[str, Any]  # A row of each array of a batch: pixels, a number or a text.
Batch = dict[str, np.ndarray]

# Decoded training images stay in memory, in each process that decodes, if all of them take no more than this.
KEPT_BYTES = 2**28


@runtime_checkable
class StoredLogits(Protocol):
    """A teacher's predictions for each example, as `evaluation.predictions` reads them."""

    @property
    def label(self) -> np.ndarray:
        """The labels, int (N,)."""

    @property
    def logits(self) -> np.ndarray:
        """The logits, float (N, num_classes)."""


def eval_batches(
    source: Source,
    preprocess: Preprocess,
    *,
    batch_size: int,
    limit: int | None = None,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int | None = None,
) -> Iterable[Batch]:
    """Return batches with all examples, once and in order.

    Args:
      source: the examples.
      preprocess: how to prepare the images.
      batch_size: examples per batch over all hosts; a multiple of their number.
      limit: read only this many examples.
      host: index of this host, which reads a slice of each batch: its rows host * b to (host + 1) * b - 1, where b is
        batch_size / hosts.
      hosts: number of hosts.
      workers: number of processes that decode; 0 decodes in threads of this process.
      threads: number of decoding threads, per worker if there are workers; None: one per core.

    Returns:
      An iterable of {"images": uint8 (b, H, W, C), "labels": int32 (b,) or (b, K), "mask": float32 (b,), "names":
      str (b,)}. Padding with mask 0 completes the last batch.
    """
    count = len(source) if limit is None else min(limit, len(source))

    def load(position: int) -> Row:
        if position >= count:
            empty = np.zeros((*preprocess.size, preprocess.channels), np.uint8)
            nothing = np.zeros(source.label_shape, np.int32)
            return {"images": empty, "labels": nothing, "mask": np.float32(0), "names": ""}
        example = source[position]
        image = geometry.prepare(example.image, preprocess, example.name)
        return {"images": image, "labels": np.int32(example.label), "mask": np.float32(1), "names": example.name}

    rows = _host_rows(batch_size, 0, -(-count // batch_size), host, hosts)
    return _batches(rows.map(load), batch_size // hosts, workers, threads)


def train_batches(
    source: Source,
    config: TrainConfig,
    plan: BatchPlan | None = None,
    *,
    start_step: int = 0,
    stop_step: int,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int | None = None,
    stored: StoredLogits | None = None,
) -> Iterable[Batch]:
    """Return the batches of the steps start_step to stop_step - 1.

    Every pass over the data has its own order. Each row is a pure function of the seed and its position in the run. The
    next sound image of the data replaces a damaged one, with the same random numbers; the other rows do not change.

    Args:
      source: the examples.
      config: batch size, seed, preprocessing and augmentation.
      plan: how the batch is divided; None: for a single device.
      start_step: first step.
      stop_step: step after the last one.
      host: index of this host, which reads a slice of each part of a batch, as in `eval_batches`.
      hosts: number of hosts.
      workers: number of processes that decode; 0 decodes in threads of this process.
      threads: number of decoding threads, per worker if there are workers; None: one per core.
      stored: a teacher's predictions for the examples.

    Returns:
      An iterable of {"images": uint8 (b, H, W, C), "labels": int32 (b,), "flip": bool (b,), "erase": int32 (b, 4) with
      (top, left, height, width) of a rectangle, "damaged": str (b,)}. "damaged" is the error about the image that was
      replaced, or empty. An incomplete last batch of a pass also has "mask": float32 (b,), 0 for padding. With `stored`
      there is "teacher": (b, num_classes).

    Raises:
      InputError: no image can be read, or `stored` belongs to other examples.
    """
    plan = plan or plan_batch(config.batch_size, config.bn_group_size, 1, parts=1)
    size, preprocess, whole = len(source), config.train_preprocess, Epoch(len(source), plan)
    order = Balanced(source, config.seed) if config.sampling == BALANCED else Shuffled(size, config.seed)
    # The fast crop decodes only the part that it needs.
    crops_fast = config.crop == "random" and config.transform == "fast"
    examples: Source | _Decoded = source if crops_fast else _Decoded(source, preprocess)

    def readable(index: int, seed: tuple[int, int]) -> tuple[int, Row]:
        """Return (index, row) of the first sound image from an index on."""
        damaged = ""
        for found in (i % size for i in range(index, index + size)):
            try:
                example = examples[found]
                # Each try gets a new generator, since a damaged image may have drawn numbers.
                row = augmentation.training_row(example, config, preprocess, np.random.default_rng(seed))
                return found, {**row, "labels": np.int32(example.label), "damaged": damaged}
            except InputError as error:
                damaged = damaged or str(error)
        raise InputError(f"no image of the training data can be read; the first: {damaged}")

    def load(position: int) -> Row:
        epoch, place, real = whole.find(*divmod(position, plan.batch_size))
        index = order.find(place % size // config.aug_repeats, epoch)
        index, row = readable(index, seed=(config.seed, epoch * whole.padded + place))
        if stored:
            if stored.label[index] != row["labels"]:
                raise InputError(f"the teacher's predictions belong to other data: example {index} has another label")
            row["teacher"] = stored.logits[index]
        return row if real is None else {**row, "mask": np.float32(real)}

    part, parts = plan.batch_size // plan.parts, plan.parts
    rows = _host_rows(part, start_step * parts, stop_step * parts, host, hosts)
    return _batches(rows.map(load), plan.batch_size // hosts, workers, threads)


def blank_row(config: TrainConfig) -> Row:
    """Return a row of `train_batches` as a TrainConfig asks for it, of a black image: its names, shapes and types."""
    preprocess = config.train_preprocess
    blank = np.zeros((*preprocess.size, 3), np.uint8)
    row = augmentation.training_row(Example("blank", blank, 0), config, preprocess, np.random.default_rng(0))
    return {**row, "labels": np.int32(0)}


class _Decoded:
    """Examples of a source with decoded images. They stay in memory if all of them fit in KEPT_BYTES."""

    def __init__(self, source: Source, preprocess: Preprocess) -> None:
        self._source, self._preprocess = source, preprocess
        self._kept: dict[int, Example] = {}

    def __getitem__(self, index: int) -> Example:
        found = self._kept.get(index)
        if found is None:
            found = self._source[index]
            if isinstance(found.image, bytes):
                pixels = decoding.decode(found.image, self._preprocess.decoder, found.name)
                found = found._replace(image=pixels)
                if pixels.nbytes * len(self._source) <= KEPT_BYTES:
                    self._kept[index] = found
        return found


class Shuffled(NamedTuple):
    """The order of passes that take each example once.

    Attributes:
      size: number of examples.
      seed: seed of the run.
    """

    size: int
    seed: int

    def find(self, place: int, epoch: int) -> int:
        """Return the example at a place of a pass."""
        return shuffled(place, self.size, self.seed, epoch)


class Balanced:
    """The order of passes that take equally many examples of each class, or one more. Classes without any are left out.

    A class gives its examples in random orders, one after another, so that none repeats before all are taken.

    Args:
      source: the examples.
      seed: seed of the run.
    """

    def __init__(self, source: Source, seed: int) -> None:
        labels = np.fromiter(source.labels(), np.int64)
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self._size, self._seed = len(labels), seed

    def find(self, place: int, epoch: int) -> int:
        """Return the example at a place of a pass."""
        number, label = divmod(shuffled(place, self._size, self._seed, epoch), len(self._members))
        members = self._members[label]
        turn, number = divmod(number, len(members))
        return int(members[index_shuffle(number, len(members) - 1, _epoch_seed(self._seed, epoch, label, turn), 8)])


def shuffled(place: int, size: int, seed: int, epoch: int) -> int:
    """Return the example at a place of a pass: a random permutation, computed for one place at a time.

    Args:
      place: from 0 to size - 1.
      size: number of examples.
      seed: seed of the run.
      epoch: number of the pass.
    """
    return index_shuffle(place, max_index=size - 1, seed=_epoch_seed(seed, epoch), rounds=8)


@functools.lru_cache(4096)
def _epoch_seed(*numbers: int) -> int:
    """Return a seed for a permutation, from the numbers that distinguish it: those of the run, the pass, the class."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _host_rows(batch_size: int, start: int, stop: int, host: int, hosts: int) -> grain.MapDataset:
    """Return the positions that one host reads, in order: its slice of the batches start to stop - 1."""
    rows, rest = divmod(batch_size, hosts)
    if rest:
        raise InputError(f"batch_size is {batch_size}, but must be a multiple of the {hosts} hosts")

    def position(row: int) -> int:
        step, place = divmod(row, rows)
        return step * batch_size + host * rows + place

    return grain.MapDataset.range(start * rows, stop * rows).map(position)


def _batches(examples: grain.MapDataset, batch_size: int, workers: int, threads: int | None) -> Iterable[Batch]:
    """Return batches of a MapDataset. A thread makes a whole batch, and some batches are prepared in advance."""
    threads = threads or usable_cores()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = examples.batch(batch_size).to_iter_dataset(options)
    if not workers:
        return batches
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags when it starts workers, but nothing parses them.
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
