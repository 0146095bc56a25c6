"""Official tars, class folders, zips and TFDS's TFRecords as a TFDS data set in ArrayRecord form, without TensorFlow.

A shard is written aside by one process and then renamed, so that work which was stopped goes on where it was; the
result is a pure function of the source and the options.
"""

import dataclasses
import io
import json
import multiprocessing
import re
import shutil
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from ..cli import usable_cores
from ..errors import InputError
from ..files import path_of, printable
from .jpeg import ORIENTATION, orientation_in
from .labels import imagenet_classes
from .locations import Location, zip_files
from .sources import EVAL_SPLITS, IMAGE_SUFFIXES, open_tfds
from .transforms import damage_named, decode

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
WRITER_OPTIONS = "group_size:1,uncompressed"  # Records are read one by one, and JPEGs do not shrink further.


class Entry(NamedTuple):
    name: str
    label: int
    location: Location


@dataclass(frozen=True)
class Options:
    """What changes the result beside the source."""

    short_edge: int | None = None  # Store images with at most this short side, in pixels.
    quality: int = 90  # JPEG quality of images that are stored smaller.
    skip_damaged: bool = False  # Leave out what cannot be decoded, instead of stopping.
    shard_size: int = 1024  # Images a file; 100 to 150 MB of ImageNet.


@dataclass(frozen=True)
class Contents:
    """A source of images: {split: entries} and the names of the labels."""

    splits: dict
    classes: tuple


# Sources


def read_contents(source):
    """The images in a class folder, a zip of one, or one or both of ILSVRC2012's tars.

    Raises:
      InputError: the source is none of these, or holds no images.
    """
    source = path_of(source)
    try:
        if source.is_dir():
            tars = [source / f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")]
            tars = [path for path in tars if path.is_file()]
            contents = _read_tars(tars) if tars else _read_tree(_folder_files(source))
        elif source.is_file() and zipfile.is_zipfile(source):
            contents = _read_tree(_zip_files(source))
        elif source.is_file() and tarfile.is_tarfile(source):
            contents = _read_tars([source])
        else:
            raise InputError(f"{source} is no folder, zip or tar of images; check --source")
    except InputError:
        raise
    except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise InputError(f"{source} is damaged: {error}; fetch it again") from error
    if not any(contents.splits.values()):
        raise InputError(f"{source} holds no images as <split>/<class>/<image>, nor ILSVRC2012's tars")
    return contents


def _folder_files(root):
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            yield path.relative_to(root).parts, Location(str(path))


def _zip_files(path):
    for parts, location in zip_files(path, splits=("train", *EVAL_SPLITS)).items():
        if Path(parts[-1]).suffix.lower() in IMAGE_SUFFIXES:
            yield parts, location


def _read_tree(files):
    """Class folders: files come as ((split, class, ..., name), location)."""
    files = [(parts, location) for parts, location in files if len(parts) >= 3]
    for split in {parts[0] for parts, _ in files}:
        if not re.fullmatch(r"\w+", split):
            raise InputError(f"{split!r} is no name for a split; use letters, digits and _")
    for name in {parts[1] for parts, _ in files}:
        if not name.isprintable() or name.strip() in ("", ".", ".."):
            raise InputError(f"{name!r} is no name for a class; use characters that can be printed")
    classes = tuple(sorted({parts[1] for parts, _ in files}))
    rank = {name: label for label, name in enumerate(classes)}
    splits = {}
    for (split, *parts), location in files:
        splits.setdefault(split, []).append(Entry(printable("/".join(parts)), rank[parts[0]], location))
    return Contents(splits, classes)


def _read_tars(paths):
    classes = tuple(imagenet_classes())
    rank = {wnid: label for label, wnid in enumerate(classes)}
    splits = {}
    for path in paths:
        members = list(_tar_members(path, 0))
        if any(name.endswith(".tar") for name, *_ in members):
            splits["train"] = [
                Entry(inner, _label(rank, name.removesuffix(".tar"), path), Location(str(path), start, size))
                for name, offset, _ in sorted(members)
                for inner, start, size in sorted(_tar_members(path, offset))
            ]
        else:
            wnids = _validation_wnids()
            splits["validation"] = []
            for name, start, size in sorted(members):
                number = VALIDATION_NAME.fullmatch(name)
                if not number or not 1 <= int(number[1]) <= len(wnids):
                    raise InputError(f"{path} holds {name}, which is no image of ILSVRC2012's validation set")
                wnid = wnids[int(number[1]) - 1]
                splits["validation"].append(Entry(name, rank[wnid], Location(str(path), start, size)))
    return Contents(splits, classes)


def _label(rank, wnid, path):
    if wnid not in rank:
        raise InputError(f"{path} holds {wnid}.tar, which is no class of ILSVRC2012")
    return rank[wnid]


def _tar_members(path, offset):
    """(name, offset in the file, size) of each file in a tar that begins at an offset."""
    with open(path, "rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield Path(member.name).name, member.offset_data, member.size


def _validation_wnids():
    """The WNID of each validation image by its number; the list ships with TFDS."""
    path = Path(tfds.__file__).parent / "datasets" / "imagenet2012" / "validation_labels.txt"
    return path.read_text(encoding="utf-8").split()


# Records


def features_for(classes):
    """The features of a data set of labelled images, those of TFDS's imagenet2012."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(classes)),
            "file_name": tfds.features.Text(),
        }
    )


def shrink(data, short_edge, quality, name):
    """An image as JPEG with at most that short side; smaller ones stay as they are. Keeps the EXIF orientation."""
    with Image.open(io.BytesIO(data)) as image:
        short = min(image.size)
        if short <= short_edge:
            decode(data, "pillow", name)
            return data
        size = [short_edge if side == short else int(short_edge * side / short) for side in image.size]
        exif = Image.Exif()
        if (orientation := orientation_in(image.getexif())) != 1:
            exif[ORIENTATION] = orientation
        resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    # Each block for itself costs 4 % more bytes, and training then decodes those of its crop alone.
    resized.save(buffer, "JPEG", quality=quality, exif=exif if exif else b"", restart_marker_blocks=1)
    return buffer.getvalue()


def stored_bytes(entry, options):
    """What the data set keeps of an image. Raises InputError when it is damaged."""
    data = entry.location.read()
    if options.short_edge is None:
        decode(data, "pillow", entry.name)
        return data
    with damage_named(entry.name):
        return shrink(data, options.short_edge, options.quality, entry.name)


def image_records(entries, classes, options, damaged):
    """Serialised examples of images; names of damaged ones go to a list if they may be skipped."""
    features = features_for(classes)
    for entry in entries:
        try:
            data = stored_bytes(entry, options)
        except InputError as error:
            if not options.skip_damaged:
                raise InputError(f"{error}, or add --skip-damaged") from error
            damaged.append(str(error))
            continue
        record = features.serialize_example({"image": io.BytesIO(data), "label": entry.label, "file_name": entry.name})
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


# Shards


@dataclass(frozen=True)
class Job:
    """One shard to write: of images, or of a TFRecord file."""

    target: Path
    entries: tuple = ()
    tfrecord: Path | None = None
    classes: tuple = ()
    options: Options = Options()


def write_shard(job):
    """Writes a shard and, beside it, what is known of it. Returns {"examples", "bytes", "damaged"}."""
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
    report = {"examples": examples, "bytes": size, "damaged": damaged}
    note = _note(job.target)
    note.with_suffix(".draft").write_text(json.dumps(report), encoding="utf-8")
    note.with_suffix(".draft").replace(note)
    draft.replace(job.target)  # Last: a shard that has its name is finished.
    return report


def _note(shard):
    return shard.parent / "notes" / f"{shard.name}.json"


def write_shards(jobs, processes, on_done):
    """Writes the shards that are not there yet; calls `on_done(report)` after each, the old ones first."""
    open_jobs = []
    for job in jobs:
        if job.target.exists() and _note(job.target).exists():
            on_done(json.loads(_note(job.target).read_text(encoding="utf-8")))
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
            raise InputError("a process was killed, perhaps for want of memory; try fewer --processes") from error
        finally:
            pool.shutdown(cancel_futures=True)


# Data sets


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


def plan_images(contents, source, name, out, options):
    """A Plan for images. Raises InputError if NAME is one of TFDS's own with other features."""
    features = features_for(contents.classes)
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
    settings = {"source": str(path_of(source).absolute()), **dataclasses.asdict(options)}
    return Plan(folder, draft, name, version, features, splits, settings)


def plan_tfrecords(source, name, out):
    """A Plan for a TFDS directory of TFRecords: the same shards, record by record."""
    source = path_of(source)
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
    advice = "choose another --name"
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
      on_done: called with {"examples", "bytes", "damaged"} of each shard once it is written.
    Returns:
      {"examples": {split: number}, "damaged": [what was left out and why]}.
    Raises:
      InputError: it is there already, or was begun with other options, or an image is damaged.
    """
    if plan.folder.exists():
        raise InputError(f"{plan.folder} exists already; remove it or choose another --name")
    _claim(plan)
    reports = {}
    for split, jobs in plan.splits.items():
        write_shards(jobs, processes or usable_cores(), on_done)
        reports[split] = [json.loads(_note(job.target).read_text(encoding="utf-8")) for job in jobs]
    empty = [split for split, found in reports.items() if not any(report["examples"] for report in found)]
    if empty:
        raise InputError(f"no image of split {empty[0]} can be read; the source is damaged")
    _describe(plan, reports)
    shutil.rmtree(plan.draft / "notes")
    (plan.draft / "settings.json").unlink()
    plan.draft.rename(plan.folder)
    return {
        "examples": {split: sum(r["examples"] for r in found) for split, found in reports.items()},
        "damaged": [name for found in reports.values() for r in found for name in r["damaged"]],
    }


def _claim(plan):
    """Makes the draft folder, or checks that what lies there was begun with the same options."""
    settings = plan.draft / "settings.json"
    try:
        (plan.draft / "notes").mkdir(parents=True, exist_ok=True)
        if settings.exists():
            if json.loads(settings.read_text(encoding="utf-8")) != plan.settings:
                raise InputError(f"{plan.draft} was begun with another source or options; remove it to start anew")
        else:
            settings.write_text(json.dumps(plan.settings), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{plan.draft} cannot be written: {error.strerror}; choose another --out") from error


def _describe(plan, reports):
    """Writes the files by which TFDS knows a data set."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=plan.draft, dataset_name=plan.name.partition("/")[0], filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[report["examples"] for report in found],
            num_bytes=sum(report["bytes"] for report in found),
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
