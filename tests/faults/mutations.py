"""What can be wrong with bytes, JSON, tensors, images and archives. Each function takes a random.Random first, changes
one thing, and returns what it made together with words for it."""

import functools
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image

HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**30)
WILD = (None, True, False, -1, 0, 1, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), *HUGE)
WORDS = ("", " ", "x" * 5000, "../../escape", "/dev/null", "\0", "nan", "\ud800", "é\u202e", "-1", "%s%n", "$HOME", "~")
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000  # More than Python turns into a number.


def wild_value(rng):
    return rng.choice([*WILD, *WORDS, [], {}, [[]], {"x": 1}, [None], [1, "a"]])


# Bytes


def damage_bytes(rng, data):
    size = len(data)
    place, length = rng.randrange(size + 1), 1 + rng.randrange(64)
    kinds = {
        "cut off": lambda: data[:place],
        "cut off near the end": lambda: data[: max(0, size - length)],
        "without its beginning": lambda: data[length:],
        "bits flipped": lambda: _flipped(rng, data, rng.choice((1, 1, 8, 100))),
        "bits flipped at the beginning": lambda: _flipped(rng, data[:200], 4) + data[200:],
        "bits flipped at the end": lambda: data[:-200] + _flipped(rng, data[-200:], 4),
        "zeroed in part": lambda: data[:place] + bytes(min(length, size - place)) + data[place + length :],
        "overwritten in part": lambda: data[:place] + rng.randbytes(length) + data[place + length :],
        "bytes missing": lambda: data[:place] + data[place + length :],
        "bytes inserted": lambda: data[:place] + rng.randbytes(length) + data[place:],
        "bytes doubled": lambda: data[: place + length] + data[place:],
        "bytes appended": lambda: data + rng.randbytes(length),
        "halves exchanged": lambda: data[size // 2 :] + data[: size // 2],
        "a largest number inserted": lambda: data[:place] + b"\xff" * 8 + data[place + 8 :],
        "empty": lambda: b"",
        "noise": lambda: rng.randbytes(min(size, 10_000)),
        "untouched": lambda: data,
    }
    kind = rng.choice(list(kinds))
    return kinds[kind](), kind


def _flipped(rng, data, count):
    changed = bytearray(data)
    for _ in range(count if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage_file(rng, path):
    """Damages a file in place. Returns words for what was done."""
    data, kind = damage_bytes(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name} {kind}"


def damage_entry(rng, path):
    """Puts something else in the place of a file or folder. Returns words for it."""
    remove(path)
    kinds = {
        "missing": lambda: None,
        "a folder": path.mkdir,
        "a link to itself": lambda: path.symlink_to(path),
        "a loop of links": lambda: (path.symlink_to(f"{path}.2"), os.symlink(path, f"{path}.2")),
        "a broken link": lambda: path.symlink_to("nowhere"),
        "a link to its folder": lambda: path.symlink_to("."),
        "a pipe": lambda: os.mkfifo(path),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a file of text": lambda: path.write_text("no such thing\n"),
    }
    kind = rng.choice(list(kinds))
    kinds[kind]()
    return f"{path.name} is {kind}"


def damage_folder(rng, folder, suffixes=("",)):
    """Damages one of a folder's files, or exchanges two. Returns words for it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(suffixes))
    files.sort(key=lambda path: (len(path.parts), path.stat().st_size))  # Orbax's names are random.
    path = rng.choice(files)
    chance = rng.random()
    if chance < 0.65:
        return damage_file(rng, path)
    if chance < 0.75 and (path.suffix == ".json" or path.name.endswith("METADATA")):
        return damage_json_file(rng, path)
    if chance < 0.85:
        other = rng.choice(files)
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
        return f"{path.name} and {other.name} exchanged"
    return damage_entry(rng, rng.choice((path, path.parent)) if path.parent != folder else path)


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# JSON


def damage_json_file(rng, path, keep=()):
    """Changes one thing in a JSON file; the keys in `keep` stay."""
    text, told = damage_json(rng, path.read_text(), keep)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"{path.name}: {told}"


def damage_json(rng, text, keep=()):
    chance = rng.random()
    if chance < 0.15:
        data, kind = damage_bytes(rng, text.encode())
        return data.decode("latin-1"), kind
    if chance < 0.25:
        return rng.choice((DEEP, DIGITS, "null", "[]", "{}", '"x"', "NaN", "[" + text + "]")), "other JSON"
    tree = json.loads(text)
    places = [place for place in _places(tree) if place[1] not in keep]
    if not places:
        return "[]", "other JSON"
    holder, key = rng.choice(places)
    if chance < 0.4:
        del holder[key]
        return json.dumps(tree), f"{key} missing"
    if chance < 0.5 and isinstance(holder, dict):
        holder[rng.choice(WORDS)] = wild_value(rng)
        return json.dumps(tree), "a key too many"
    if chance < 0.6:
        marker = "MARKER"
        holder[key] = marker
        return json.dumps(tree).replace(f'"{marker}"', rng.choice((DEEP, DIGITS, "1e999", "-" + DIGITS))), f"{key} vast"
    holder[key] = value = wild_value(rng)
    return json.dumps(tree), f"{key} is {str(value)[:30]!r}"


def _places(tree):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


# PyTorch's files


class Touch:
    """Unpickled carelessly, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def damage_tensors(rng, tensors, canary):
    """{key: tensor} with one fault, or something else that can be saved."""
    tensors = dict(tensors)
    key, other = rng.sample(list(tensors), 2)
    value = tensors[key]
    floats = [k for k, v in tensors.items() if v.is_floating_point()]
    number = rng.choice(floats)

    def poisoned(bad):
        changed = tensors[number].clone()
        changed.view(-1)[rng.randrange(changed.numel())] = bad
        return tensors | {number: changed}

    def vast(shape):
        # One number in the file, however large the shape.
        return tensors | {key: torch.zeros(1).expand(shape)}

    kinds = {
        "nan": lambda: poisoned(float("nan")),
        "inf": lambda: poisoned(float("inf")),
        "minus inf": lambda: poisoned(-float("inf")),
        "largest float": lambda: poisoned(3.4e38),
        "exchanged": lambda: tensors | {key: tensors[other], other: value},
        "renamed": lambda: {(k if k != key else rng.choice(WORDS)): v for k, v in tensors.items()},
        "missing": lambda: {k: v for k, v in tensors.items() if k != key},
        "too many": lambda: tensors | {rng.choice(WORDS): value},
        "twice": lambda: tensors | {f"module.{key}": value},
        "an axis too many": lambda: tensors | {key: value[None]},
        "transposed": lambda: tensors | {key: value.transpose(0, -1) if value.ndim else value},
        "without numbers": lambda: tensors | {key: torch.zeros(0)},
        "vast": lambda: vast(rng.choice(((2**40,), (2**31, 24, 1, 1), (2**20, 2**20), (10**6, 1024)))),
        "vast classifier": lambda: {
            k: torch.zeros(1).expand(10**9, *v.shape[1:]) if k.endswith(("fc.weight", "classifier.0.weight")) else v
            for k, v in tensors.items()
        },
        "integers": lambda: tensors | {number: tensors[number].int()},
        "doubles": lambda: {k: v.double() for k, v in tensors.items()},
        "other doubles": lambda: tensors | {number: tensors[number].double() * (1 + 1e-12) + 1e-300},
        "halves": lambda: {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()},
        "complex": lambda: tensors | {number: tensors[number].to(torch.complex64)},
        "booleans": lambda: tensors | {number: tensors[number].bool()},
        "sparse": lambda: tensors | {number: tensors[number].to_sparse()},
        "meta": lambda: tensors | {number: tensors[number].to("meta")},
        "negative variances": lambda: {k: -v if k.endswith("running_var") else v for k, v in tensors.items()},
        "a word": lambda: tensors | {key: rng.choice(WORDS)},
        "a number": lambda: tensors | {key: 3},
        "nothing": lambda: tensors | {key: None},
        "numbers as keys": lambda: dict(enumerate(tensors.values())),
        "a list": lambda: list(tensors.values()),
        "no tensors": dict,
        "itself": lambda: _holding_itself(tensors),
        "deep": lambda: _nested(tensors, 100),
        "code": lambda: tensors | {"x": Touch(canary)},
        "code in meta": lambda: {"state_dict": tensors, "meta": {"x": Touch(canary)}},
        "odd classes": lambda: {
            "state_dict": tensors,
            "meta": {
                "CLASSES": rng.choice(([None] * 10, ["x" * 10**6] * 10, list(WORDS[:10]), 3, {"a": 1}, ["a"] * 10))
            },
        },
        "odd meta": lambda: {"state_dict": tensors, "meta": wild_value(rng)},
        "odd state dict": lambda: {"state_dict": wild_value(rng), "meta": {}},
        "many counts": lambda: {
            k: torch.tensor(rng.choice((-1, 2**62))) if k.endswith("tracked") else v for k, v in tensors.items()
        },
    }
    kind = rng.choice(list(kinds))
    return kinds[kind](), f"tensors: {kind}"


def _holding_itself(tensors):
    tensors["self"] = tensors
    return tensors


def _nested(value, depth):
    for _ in range(depth):
        value = {"state_dict": value}
    return value


PICKLES = {
    "calls os.system": lambda canary: b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(canary),
    "calls eval": lambda canary: b"cbuiltins\neval\n(S'open(%r, \"w\")'\ntR." % str(canary).encode(),
    "asks for a terabyte": lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "a vast integer": lambda _: b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "a vast memo": lambda _: b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".",
    "deep tuples": lambda _: b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "grows by itself": lambda _: b"\x80\x02](h\x00" + b"".join(b"q%c" % i for i in range(200)) + b"e.",
    "no end": lambda _: b"\x80\x02}",
    "empty": lambda _: b"",
}


def damage_torch_zip(rng, data, canary):
    """Rewrites PyTorch's zip with one odd member."""
    members = {info.filename: zipfile.ZipFile(io.BytesIO(data)).read(info) for info in _members(data)}
    root = next(iter(members)).split("/")[0]
    pickle = f"{root}/data.pkl"
    kind = rng.choice(("pickle", "pickle", "bomb", "names", "missing", "renamed", "bytes", "twice"))
    compression = zipfile.ZIP_STORED
    if kind == "pickle":
        kind, made = rng.choice(list(PICKLES.items()))
        members[pickle] = made(canary)
    elif kind == "bomb":
        member = rng.choice(list(members))
        members[member] = bytes(rng.choice((10**7, 3 * 10**8)))
        compression = zipfile.ZIP_DEFLATED
    elif kind == "names":
        members = {name.replace("data/", "data/../../../escape/"): content for name, content in members.items()}
    elif kind == "missing":
        del members[rng.choice(list(members))]
    elif kind == "renamed":
        members[rng.choice(WORDS).replace("\0", "").replace("\ud800", "") or "x"] = members.pop(
            rng.choice(list(members))
        )
    else:
        member = rng.choice(list(members))
        members[member], word = damage_bytes(rng, members[member])
        kind = f"{member} {word}"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue(), f"torch zip: {kind}"


def _members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.infolist()


# Images


def odd_image(rng):
    """(encoded bytes, words, whether it is sound)."""
    rows = np.frombuffer(rng.randbytes(40 * 50 * 3), np.uint8).reshape(40, 50, 3)
    picture = Image.fromarray(rows)

    def saved(image, form, **options):
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    kinds = {
        "16 bits": lambda: saved(Image.fromarray(rows[..., 0].astype(np.uint16) * 257), "PNG"),
        "CMYK": lambda: saved(picture.convert("CMYK"), "JPEG"),
        "palette": lambda: saved(picture.convert("P"), "PNG", transparency=3),
        "animated": lambda: saved(picture, "PNG", save_all=True, append_images=[picture.rotate(90)] * 3),
        "animated webp": lambda: saved(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)] * 3),
        "one pixel": lambda: saved(picture.resize((1, 1)), "PNG"),
        "a line": lambda: saved(picture.resize((4000, 1)), "PNG"),
        "grey": lambda: saved(picture.convert("L"), "JPEG"),
        "bits": lambda: saved(picture.convert("1"), "PNG"),
        "transparent": lambda: saved(picture.convert("RGBA"), "PNG"),
        "progressive": lambda: saved(picture, "JPEG", progressive=True),
        "turned": lambda: saved(picture, "JPEG", exif=_turned(rng.randrange(12))),
        "damaged EXIF": lambda: saved(picture, "JPEG", exif=b"Exif\0\0" + rng.randbytes(60)),
        "odd profile": lambda: saved(picture, "PNG", icc_profile=rng.randbytes(80)),
        "gif": lambda: saved(picture, "GIF"),
        "tiff": lambda: saved(picture, "TIFF"),
        "bmp": lambda: saved(picture, "BMP"),
        "bomb of 50,000 x 50,000": lambda: png_of(50_000, 50_000),
        "bomb of 10,000 x 10,000": lambda: png_of(10_000, 10_000),
        "vast PNG of nothing": lambda: png_of(2**31 - 1, 2**31 - 1, rows=1),
        "no pixels": lambda: png_of(0, 0, rows=0),
        "vast JPEG": lambda: resized_jpeg(saved(picture, "JPEG"), rng.choice((65535, 30000, 20000)), 65500),
        "large JPEG": lambda: resized_jpeg(saved(picture, "JPEG"), 30000, 30000),
        "vast text": lambda: with_chunk(saved(picture, "PNG"), b"zTXt", b"x\0\0" + squeezed(10**9)),
        "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    }
    kind = rng.choice(list(kinds))
    return kinds[kind](), f"image: {kind}"


def _turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@functools.cache
def png_of(width, height, rows=None):
    """A PNG of black bits, of any size."""
    rows = height if rows is None else rows
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    compressor, pieces = zlib.compressobj(1), []
    line = bytes(1 + min(width, 10**6) // 8)
    for _ in range(rows // 100):
        pieces.append(compressor.compress(line * 100))
    pieces.append(compressor.compress(line * (rows % 100)) + compressor.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(pieces)) + chunk(b"IEND", b"")


@functools.cache
def squeezed(size):
    return zlib.compress(bytes(size), 1)


def with_chunk(png, kind, content):
    return png[:33] + chunk(kind, content) + png[33:]


def resized_jpeg(data, height, width):
    """A JPEG whose frame claims another size."""
    place = data.index(b"\xff\xc0")
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def damage_image(rng, path):
    """Puts a damaged or odd image in the place of one. Returns words for it."""
    if rng.random() < 0.5:
        return damage_file(rng, path)
    data, told = odd_image(rng)
    path.write_bytes(data)
    return f"{path.name}: {told}"


# Archives


ODD_NAMES = (
    "../../../../escape/x/0.jpg",
    "/escape/x/0.jpg",
    "{escape}/x/0.jpg",
    "train/../../../0.jpg",
    "train/kind0/../../../../0.jpg",
    "train//0.jpg",
    "train/kind0/",
    "train/" + "x" * 300 + "/0.jpg",
    "train/\\..\\..\\escape/0.jpg",
    "train/ /0.jpg",
    "train/kind0/0\n0.jpg",
    "./train/./kind0/./0.jpg",
    "C:/train/kind0/0.jpg",
)


def zip_of(members):
    """A zip of [(name, bytes)]; names may come twice."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content, compresslevel=1)
    return buffer.getvalue()


def damage_zip(rng, members, escape):
    """The bytes of a zip of [(name, bytes)] with one fault."""
    members = list(members)
    place = rng.randrange(len(members))
    name, content = members[place]
    kind = rng.choice(
        ("bytes", "bytes", "name", "bomb", "twice", "lying", "locked", "nested", "image", "many", "method")
    )
    if kind == "name":
        odd = rng.choice(ODD_NAMES).format(escape=escape)
        members[place] = (odd, content)
        kind = f"name {odd[:40]!r}"
    elif kind == "bomb":
        return bomb_of(members[0][0], rng.choice((10**8, 3 * 10**9))), "zip: bomb"
    elif kind == "twice":
        members.append((name, members[place - 1][1]))
    elif kind == "nested":
        members[place] = (name, zip_of(members))
    elif kind == "image":
        content, kind = odd_image(rng)
        members[place] = (name, content)
    elif kind == "many":
        members += [(f"train/many{i}/0.jpg", b"") for i in range(3000)]
    data = zip_of(members)
    if kind == "bytes":
        data, kind = damage_bytes(rng, data)
    elif kind == "lying":  # About its size, in the directory at the end alone.
        start = data.index(b"PK\x01\x02")
        data = data[: start + 24] + struct.pack("<I", rng.choice((1, 2**32 - 2))) + data[start + 28 :]
    elif kind == "locked":
        start = data.index(b"PK\x01\x02")
        data = data[: start + 8] + b"\x01\x00" + data[start + 10 :]
    elif kind == "method":
        start = data.index(b"PK\x01\x02")
        data = data[: start + 10] + bytes([rng.choice((9, 12, 14, 99)), 0]) + data[start + 12 :]
    return data, f"zip: {kind}"


@functools.cache
def bomb_of(name, size):
    """A zip of one member of that many zeros."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        for _ in range(size // 10**7):
            file.write(bytes(10**7))
    return buffer.getvalue()


def tar_of(members):
    """A tar of [(name, bytes, or a TarInfo's type and link target)]."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return buffer.getvalue()


def damage_tar(rng, members, escape):
    """The bytes of a tar of [(name, bytes)] with one fault."""
    members = list(members)
    place = rng.randrange(len(members))
    name, content = members[place]
    kind = rng.choice(("bytes", "bytes", "name", "link", "hard link", "device", "twice", "size", "image", "inner"))
    if kind == "name":
        members[place] = (rng.choice(ODD_NAMES).format(escape=escape).replace("0.jpg", name), content)
    elif kind in ("link", "hard link", "device"):
        how = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[kind]
        members[place] = (name, (how, rng.choice(("/etc/passwd", "../../escape", name))))
    elif kind == "twice":
        members.append((name, content))
    elif kind == "image":
        content, kind = odd_image(rng)
        members[place] = (name, content)
    elif kind == "inner":
        content, kind = damage_bytes(rng, content)
        members[place] = (name, content)
    data = tar_of(members)
    if kind == "bytes":
        data, kind = damage_bytes(rng, data)
    elif kind == "size":
        info = tarfile.TarInfo(name)
        info.size = rng.choice((2**33 - 1, 2**40, 2**62))
        data = info.tobuf(tarfile.GNU_FORMAT) + data[512:]
    return data, f"tar: {kind}"


# NumPy's archives


def damage_npz(rng, path, canary):
    """Rewrites an .npz with one fault. Returns words for it."""
    if rng.random() < 0.3:
        return damage_file(rng, path)
    with np.load(path) as file:
        arrays = dict(file)
    key = rng.choice(list(arrays))
    value = arrays[key]
    kinds = {
        "missing": lambda: arrays.pop(key),
        "pickled": lambda: arrays.update({key: np.array([Touch(canary)] * len(value), object)}),
        "words": lambda: arrays.update({key: np.array(["x"] * len(value))}),
        "complex": lambda: arrays.update({key: np.zeros(value.shape, complex)}),
        "nan": lambda: arrays.update({key: np.full(value.shape, np.nan)}),
        "inf": lambda: arrays.update({key: np.full(value.shape, np.inf)}),
        "large numbers": lambda: arrays.update({key: np.full(value.shape, 10**12)}),
        "negative": lambda: arrays.update({key: np.full(value.shape, -1)}),
        "one row": lambda: arrays.update({key: value[:1]}),
        "no rows": lambda: arrays.update({key: value[:0]}),
        "a number": lambda: arrays.update({key: np.float32(3)}),
        "another axis": lambda: arrays.update({key: value[None]}),
        "no columns": lambda: arrays.update({key: np.zeros((len(value), 0))}),
        "dates": lambda: arrays.update({key: np.zeros(value.shape, "M8[s]")}),
        "records": lambda: arrays.update({key: np.zeros(value.shape, "i4,f4")}),
        "all no rows": lambda: arrays.update({k: v[:0] for k, v in arrays.items()}),
        "other": lambda: arrays.update({"x": np.zeros(3)}),
    }
    kind = rng.choice([*kinds, "bomb", "vast shape", "no array"])
    if kind in kinds:
        kinds[kind]()
        np.savez(path, **arrays)
        return f"npz: {key} {kind}"
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**20 if kind == "bomb" else 2**40, 1000)}
    )
    content = {
        "bomb": lambda: buffer.getvalue() + bytes(10**8),
        "vast shape": buffer.getvalue,
        "no array": lambda: b"x",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array)
            archive.writestr(f"{name}.npy", content[kind]() if name == key else member.getvalue())
    return f"npz: {key} {kind}"
