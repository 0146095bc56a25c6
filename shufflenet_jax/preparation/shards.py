"""The shards of a data set, written side by side.

Each is written aside by one process and then renamed, so that stopped work continues where it was.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from ..errors import InputError
from .records import StoreOptions, image_records, tfrecords

WRITER_OPTIONS = "group_size:1,uncompressed"  # Records are read one by one, and JPEGs do not shrink further.


@dataclass(frozen=True)
class Job:
    """One shard to write: of images, or of a TFRecord file."""

    target: Path
    entries: tuple = ()
    tfrecord: Path | None = None
    classes: tuple | int = ()
    options: StoreOptions = field(default_factory=StoreOptions)


class ShardReport(NamedTuple):
    """What a shard holds."""

    examples: int
    bytes: int
    damaged: list[str]  # What was left out, and why.


def write_shard(job):
    """Write a shard and, beside it, its ShardReport, which is returned."""
    damaged, examples, size = [], 0, 0
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
    draft.replace(job.target)  # Last: a shard that has its name is finished.
    return report


def read_report(shard):
    """Read the ShardReport beside a shard."""
    return ShardReport(**json.loads(_note(shard).read_text(encoding="utf-8")))


def _note(shard):
    return shard.parent / "notes" / f"{shard.name}.json"


def write_shards(jobs, processes, on_done):
    """Writes the shards that are not there yet; calls `on_done(report)` after each, the old ones first."""
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
            raise InputError("a process was killed, perhaps for want of memory; try fewer `processes`") from error
        finally:
            pool.shutdown(cancel_futures=True)
