"""The shards of a data set, written in parallel.

One process writes a shard under another name and renames it when it is complete. Interrupted work therefore resumes
with the shards that are missing.
"""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from ..data.inventory import Entry
from ..errors import InputError
from .records import StoreOptions, image_records, tfrecords

WRITER_OPTIONS = "group_size:1,uncompressed"  # Records are read one by one, and JPEGs hardly compress further.


@dataclass(frozen=True)
class Job:
    """A shard to write, from images or from a TFRecord file.

    Attributes:
      target: the shard's file.
      entries: the images.
      tfrecord: the TFRecord file to copy instead.
      classes: name of each label, or the number of labels.
      options: how to store the images.
    """

    target: Path
    entries: tuple[Entry, ...] = ()
    tfrecord: Path | None = None
    classes: tuple[str, ...] | int = ()
    options: StoreOptions = field(default_factory=StoreOptions)


class ShardReport(NamedTuple):
    """The contents of a shard.

    Attributes:
      examples: number of examples.
      bytes: size of all records.
      damaged: the reason for each image that was skipped.
    """

    examples: int
    bytes: int
    damaged: list[str]


def write_shard(job: Job) -> ShardReport:
    """Write a shard, and its report in the folder `notes` beside it.

    Raises:
      InputError: an image is damaged and must not be skipped, or the TFRecord file is damaged.
    """
    damaged: list[str] = []
    examples = size = 0
    records = tfrecords(job.tfrecord) if job.tfrecord else image_records(job.entries, job.classes, job.options, damaged)
    draft = job.target.with_name(job.target.name + ".draft")
    writer = ArrayRecordWriter(str(draft), WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record)
            examples, size = examples + 1, size + len(record)
    finally:
        writer.close()
    report = ShardReport(examples, size, damaged)
    note = _note(job.target)
    note.with_suffix(".draft").write_text(json.dumps(report._asdict()), encoding="utf-8")
    note.with_suffix(".draft").replace(note)
    draft.replace(job.target)  # The last step: a shard with its final name is complete.
    return report


def read_report(shard: Path) -> ShardReport:
    """Read the report that `write_shard` stored about a shard."""
    return ShardReport(**json.loads(_note(shard).read_text(encoding="utf-8")))


def _note(shard: Path) -> Path:
    return shard.parent / "notes" / f"{shard.name}.json"


def write_shards(jobs: Sequence[Job], processes: int, on_done: Callable[[ShardReport], object]) -> None:
    """Write the shards that are missing.

    Args:
      jobs: all shards.
      processes: number of shards to write at a time.
      on_done: called with the report of each shard: first of those that exist, then of each new one.

    Raises:
      InputError: an image is damaged and must not be skipped, or the system killed a process.
    """
    open_jobs = []
    for job in jobs:
        if job.target.exists() and _note(job.target).exists():
            on_done(read_report(job.target))
        else:
            open_jobs.append(job)
    if processes == 1:
        for job in open_jobs:
            on_done(write_shard(job))
        return
    context = multiprocessing.get_context("spawn")  # Forking a process with threads may hang.
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(write_shard, job) for job in open_jobs]
        try:
            for future in as_completed(futures):
                on_done(future.result())
        except BrokenProcessPool as error:
            raise InputError(
                "the system killed a process, perhaps for lack of memory; try fewer `processes`"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
