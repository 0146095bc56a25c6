"""A TFDS data set in ArrayRecord form: plans its shards, writes them, and writes the files that describe it to TFDS.

The result is a pure function of the source and the options.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from ..data.sources import open_tfds
from ..data.workers import usable_cores
from ..errors import InputError
from ..files import UnwritableError, path_of, printable, writing, written_aside
from .contents import Contents
from .records import StoreOptions, features_for
from .shards import Job, ShardReport, read_report, write_shards

Reports = dict[str, list[ShardReport]]  # {split: the reports of its shards}


@dataclass(frozen=True)
class Plan:
    """A data set that is to be written.

    Attributes:
      folder: its final place, DIR/NAME/VERSION.
      draft: the folder in which it is written.
      name: its name, like "my_data" or "my_data/config".
      version: its version, like "1.0.0".
      features: its features.
      splits: {name of a split: its shards}.
      settings: what must be equal when interrupted work resumes, as JSON has it.
    """

    folder: Path
    draft: Path
    name: str
    version: str
    features: tfds.features.FeaturesDict
    splits: dict[str, list[Job]]
    settings: dict[str, Any]


class WrittenData(NamedTuple):
    """The contents of a data set that was written.

    Attributes:
      examples: {name of a split: number of examples}.
      damaged: the reason for each image that was skipped.
    """

    examples: dict[str, int]
    damaged: list[str]


def plan_images(contents: Contents, name: str, out: str | Path, options: StoreOptions) -> Plan:
    """Plan a data set of images.

    Args:
      contents: the images.
      name: name of the data set.
      out: folder of data sets to write it to.
      options: how to store the images.

    Raises:
      InputError: `name` is invalid, or TFDS has a data set of this name with other features.
    """
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
    settings = {
        "source": str(Path(contents.place).absolute()),
        **dataclasses.asdict(options),
        "images": _digest(contents),
    }
    return Plan(folder, draft, name, version, features, splits, settings)


def _digest(contents: Contents) -> str:
    """Return a hash of the images' names, order and labels."""
    digest = hashlib.sha256(repr(contents.classes).encode())
    for split, entries in sorted(contents.splits.items()):
        for entry in entries:
            digest.update(f"{split}/{printable(entry.name)} {entry.label}\n".encode())
    return digest.hexdigest()


def plan_tfrecords(source: str | Path, name: str, out: str | Path) -> Plan:
    """Plan a data set with the shards and records of a TFDS directory of TFRecords.

    Args:
      source: the TFDS directory.
      name: name of the data set.
      out: folder of data sets to write it to.

    Raises:
      InputError: the source is damaged or has another form, or `name` is invalid.
    """
    source, out = path_of(source), _place(out)
    info = open_tfds(source).info
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InputError(f"{source} is stored as {info.file_format.value} already; use it as it is")
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
    """Return the folder of data sets. Raise InputError if ArrayRecord cannot write below it."""
    place = path_of(out)
    if printable(str(place)) != str(place):
        raise InputError(f"{place} is not UTF-8, but ArrayRecord writes only to such paths; choose another `out`")
    return place


def is_tfds(source: str | Path) -> bool:
    """Whether a path is the directory of a TFDS data set."""
    return (path_of(source) / "dataset_info.json").is_file()


def _file_name(name: str, split: str, index: int, count: int) -> str:
    return f"{name.partition('/')[0]}-{split}.array_record-{index:05d}-of-{count:05d}"


def _version(name: str, features: tfds.features.FeaturesDict, out: Path, own: str = "1.0.0") -> str:
    """Return the version to write: that of TFDS's own data set of this name if there is one, else `own`.

    Raises:
      InputError: `name` is invalid, or TFDS has a data set of this name with other features.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*(/[\w.-]+)?", name):
        raise InputError(f"{name!r} is not a valid name for a data set; use lower-case letters, digits and _")
    base, _, config = name.partition("/")
    if base not in tfds.list_builders(with_community_datasets=False):
        if config:
            raise InputError(f"{base} is not one of TFDS's own data sets, so it has no configuration {config}; omit it")
        return own
    advice = "choose another `name`"
    configs = [config.name for config in tfds.builder_cls(base).BUILDER_CONFIGS]
    if config not in (configs or [""]):
        names = f"{base}/CONFIG, where CONFIG is one of {', '.join(configs)}" if configs else base
        raise InputError(f"{name} is not one of TFDS's own data sets; name it {names}, or {advice}")
    builder = tfds.builder(name, data_dir=out)
    if _spelled(builder.info.features) != _spelled(features):
        raise InputError(f"{name} is one of TFDS's own data sets, with other features or classes; {advice}")
    return str(builder.version)


def _spelled(features: tfds.features.FeaturesDict) -> tuple[list[str], list[str] | None]:
    """Return the names of the features and of the labels, for a comparison."""
    labels = features["label"].names if "label" in features else None
    return sorted(features), list(labels) if labels else None


def write(
    plan: Plan, *, processes: int | None = None, on_done: Callable[[ShardReport], object] = lambda _: None
) -> WrittenData:
    """Write a data set, or resume writing it.

    Args:
      plan: the data set.
      processes: number of shards to write at a time; None: one per core.
      on_done: called with the report of each shard once it is complete.

    Raises:
      InputError: the data set exists already, its draft was begun with other options, or an image is damaged and must
        not be skipped.
    """
    if plan.folder.exists():
        raise InputError(f"{plan.folder} exists already; remove it or choose another `name`")
    _claim(plan)
    with writing(plan.draft):
        reports = _carry_out(plan, processes or usable_cores(), on_done)
    return WrittenData(
        examples={split: sum(report.examples for report in shards) for split, shards in reports.items()},
        damaged=[reason for shards in reports.values() for report in shards for reason in report.damaged],
    )


def _carry_out(plan: Plan, processes: int, on_done: Callable[[ShardReport], object]) -> Reports:
    """Write the shards that are missing, move the data set to its final place and check that it can be read."""
    reports = {}
    for split, jobs in plan.splits.items():
        write_shards(jobs, processes, on_done)
        reports[split] = [read_report(job.target) for job in jobs]
    empty = [split for split, shards in reports.items() if not any(report.examples for report in shards)]
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


def _require_readable(plan: Plan, reports: Reports) -> None:
    """Raise InputError unless TFDS can read the first and the last example of each split."""
    builder = open_tfds(plan.folder)
    for split, shards in reports.items():
        try:
            records = builder.as_data_source(split, deserialize_method=tfds.core.decode.DeserializeMethod.RAW_BYTES)
            last = len(records) - 1
            complete = last + 1 == sum(report.examples for report in shards) and all((records[0], records[last]))
        except Exception as error:  # ArrayRecord and TFDS raise several exceptions for damaged shards.
            raise InputError(f"split {split} of {plan.folder} cannot be read back: {error}; try again") from error
        if not complete:
            raise InputError(f"split {split} of {plan.folder} holds other examples than were written; try again")


def _claim(plan: Plan) -> None:
    """Make the draft folder, or check that an existing one was begun with the same settings."""
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


def _describe(plan: Plan, reports: Reports) -> None:
    """Write the files that describe a data set to TFDS."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=plan.draft, dataset_name=plan.name.partition("/")[0], filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[report.examples for report in shards],
            num_bytes=sum(report.bytes for report in shards),
            filename_template=dataclasses.replace(template, split=split),
        )
        for split, shards in reports.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=plan.draft,
        features=plan.features,
        split_infos=infos,
        version=plan.version,
        filename_template=template,
        check_data=False,  # TFDS's own check needs TensorFlow.
    )
