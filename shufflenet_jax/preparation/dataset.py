"""A TFDS data set in ArrayRecord form: what it will hold, its shards, and the files by which TFDS knows it.

The result is a pure function of the source and the options.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from ..data.sources import open_tfds
from ..data.workers import usable_cores
from ..errors import InputError
from ..files import UnwritableError, path_of, printable, writing, written_aside
from .records import features_for
from .shards import Job, read_report, write_shards


@dataclass(frozen=True)
class Plan:
    """All that a data set will hold: {split: jobs}, and how it describes itself."""

    folder: Path  # Where it will lie: DIR/NAME/VERSION.
    draft: Path  # Where it is written.
    name: str
    version: str
    features: object
    splits: dict
    settings: dict  # What must be the same when stopped work goes on.


class WrittenData(NamedTuple):
    """What a finished data set holds."""

    examples: dict[str, int]  # {split: number of examples}
    damaged: list[str]  # What was left out, and why.


def plan_images(contents, source, name, out, options):
    """A Plan for images. Raises InputError if NAME is one of TFDS's own with other features."""
    features = features_for(contents.classes)
    out = _place(out)
    version = _version(name, features, out)
    folder = path_of(Path(out) / name / version)
    draft = folder.with_name(f"{version}.incomplete")
    splits = {}
    for split, entries in sorted(contents.splits.items()):
        size = options.shard_size
        shards = [tuple(entries[start : start + size]) for start in range(0, len(entries), size)]
        splits[split] = [
            Job(draft / _file_name(name, split, i, len(shards)), shard, None, contents.classes, options)
            for i, shard in enumerate(shards)
        ]
    settings = {"source": str(path_of(source).absolute()), **dataclasses.asdict(options), "images": _digest(contents)}
    return Plan(folder, draft, name, version, features, splits, settings)


def _digest(contents):
    """Return a hash of the images' names, order and labels."""
    found = hashlib.sha256(repr(contents.classes).encode())
    for split, entries in sorted(contents.splits.items()):
        for entry in entries:
            found.update(f"{split}/{printable(entry.name)} {entry.label}\n".encode())
    return found.hexdigest()


def plan_tfrecords(source, name, out):
    """A Plan for a TFDS directory of TFRecords: the same shards, record by record."""
    source, out = path_of(source), _place(out)
    info = open_tfds(source).info
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InputError(f"{source} is stored as {info.file_format.value} already; read it as it is")
    version = _version(name, info.features, out, own=str(info.version))
    folder = path_of(Path(out) / name / version)
    draft = folder.with_name(f"{version}.incomplete")
    splits = {}
    for split, described in sorted(info.splits.items()):
        files = [Path(path) for path in described.filepaths]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise InputError(f"{source} lacks {', '.join(missing[:3])}; fetch it again")
        splits[split] = [
            Job(draft / _file_name(name, split, i, len(files)), tfrecord=path) for i, path in enumerate(files)
        ]
    return Plan(folder, draft, name, version, info.features, splits, {"source": str(source.absolute())})


def _place(out: str | Path) -> Path:
    """Return the folder of data sets. Raises InputError where ArrayRecord cannot write below it."""
    place = path_of(out)
    if printable(str(place)) != str(place):
        raise InputError(f"{place} is no UTF-8, which ArrayRecord cannot write to; name another folder in `out`")
    return place


def is_tfds(source):
    return (path_of(source) / "dataset_info.json").is_file()


def _file_name(name, split, index, count):
    return f"{name.partition('/')[0]}-{split}.array_record-{index:05d}-of-{count:05d}"


def _version(name, features, out, own="1.0.0"):
    """The version to write: that of TFDS's own data set of this name, if there is one."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*(/[\w.-]+)?", name):
        raise InputError(f"{name!r} is no name for a data set; use lower-case letters, digits and _")
    base, _, config = name.partition("/")
    if base not in tfds.list_builders(with_community_datasets=False):
        if config:
            raise InputError(f"{base} is none of TFDS's own data sets and has no configuration {config}; leave it out")
        return own
    advice = "choose another `name`"
    configs = [found.name for found in tfds.builder_cls(base).BUILDER_CONFIGS]
    if config not in (configs or [""]):
        told = f"{base}/CONFIG, where CONFIG is one of {', '.join(configs)}" if configs else base
        raise InputError(f"{name} is none of TFDS's own data sets; name it {told}, or {advice}")
    builder = tfds.builder(name, data_dir=out)
    if _spelled(builder.info.features) != _spelled(features):
        raise InputError(f"{name} is one of TFDS's own data sets, with other features or classes; {advice}")
    return str(builder.version)


def _spelled(features):
    labels = features["label"].names if "label" in features else None
    return sorted(features), list(labels) if labels else None


def write(plan, *, processes=None, on_done=lambda report: None):
    """Carries a Plan out, or goes on with it.

    Args:
      plan: a Plan.
      processes: that many shards at a time; by default one for each core.
      on_done: called with the ShardReport of each shard once it is written.
    Returns:
      The WrittenData.
    Raises:
      InputError: it is there already, or was begun with other options, or an image is damaged.
    """
    if plan.folder.exists():
        raise InputError(f"{plan.folder} exists already; remove it or choose another `name`")
    _claim(plan)
    with writing(plan.draft):
        reports = _carry_out(plan, processes or usable_cores(), on_done)
    return WrittenData(
        examples={split: sum(report.examples for report in found) for split, found in reports.items()},
        damaged=[reason for found in reports.values() for report in found for reason in report.damaged],
    )


def _carry_out(plan, processes, on_done):
    """Writes what is missing, reads it back and gives it its name; returns {split: ShardReports}."""
    reports = {}
    for split, jobs in plan.splits.items():
        write_shards(jobs, processes, on_done)
        reports[split] = [read_report(job.target) for job in jobs]
    empty = [split for split, found in reports.items() if not any(report.examples for report in found)]
    if empty:
        raise InputError(f"no image of split {empty[0]} can be read; the source is damaged")
    _describe(plan, reports)
    plan.draft.rename(plan.folder)
    try:
        _require_readable(plan, reports)
    except BaseException:
        plan.folder.rename(plan.draft)
        raise
    shutil.rmtree(plan.folder / "notes")
    (plan.folder / "settings.json").unlink()
    return reports


def _require_readable(plan, reports):
    """Raises InputError unless TFDS reads the first and the last example of each split."""
    builder = open_tfds(plan.folder)
    for split, found in reports.items():
        try:
            records = builder.as_data_source(split, deserialize_method=tfds.core.decode.DeserializeMethod.RAW_BYTES)
            last = len(records) - 1
            whole = last + 1 == sum(report.examples for report in found) and all((records[0], records[last]))
        except Exception as error:  # ArrayRecord and TFDS raise several kinds for damaged shards.
            raise InputError(f"split {split} of {plan.folder} cannot be read back: {error}; try again") from error
        if not whole:
            raise InputError(f"split {split} of {plan.folder} holds other examples than were written; try again")


def _claim(plan):
    """Makes the draft folder, or checks that what lies there was begun with the same options."""
    settings = plan.draft / "settings.json"
    try:
        (plan.draft / "notes").mkdir(parents=True, exist_ok=True)
        if settings.exists():
            if json.loads(settings.read_text(encoding="utf-8")) != plan.settings:
                raise InputError(
                    f"{plan.draft} was begun with another source, other images or options, or by an older version; "
                    "remove it to start again"
                )
        else:
            with written_aside(settings) as draft:
                draft.write_text(json.dumps(plan.settings), encoding="utf-8")
    except OSError as error:
        raise UnwritableError(plan.draft, error.strerror, "choose another `out`") from error


def _describe(plan, reports):
    """Writes the files by which TFDS knows a data set."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=plan.draft, dataset_name=plan.name.partition("/")[0], filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[report.examples for report in found],
            num_bytes=sum(report.bytes for report in found),
            filename_template=dataclasses.replace(template, split=split),
        )
        for split, found in reports.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=plan.draft,
        features=plan.features,
        split_infos=infos,
        version=plan.version,
        filename_template=template,
        check_data=False,  # Its own check reads through TensorFlow.
    )
