"""What folders and archives of images hold, by one reading for all commands; and folders without splits."""

import gzip
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import unicodedata
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import random_trees
from conftest import figures_of
from PIL import Image
from random_trees import image, rows_of
from small_training import few_units

from shufflenet_jax.commands import evaluate, predict, prepare, verify
from shufflenet_jax.config import TrainConfig, current_settings
from shufflenet_jax.data import archives
from shufflenet_jax.data.decoding import decode
from shufflenet_jax.data.folders import find_images, hold_out
from shufflenet_jax.data.locations import open_zip
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.data.trees import IMAGE_SUFFIXES
from shufflenet_jax.errors import InputError
from shufflenet_jax.preparation.contents import read_contents
from shufflenet_jax.training.loop import open_sources


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    with few_units():
        yield


def put(root, names):
    """Write an image for each name below a folder, or what stands beside the name, and return the folder."""
    names = names if isinstance(names, dict) else {name: image(number) for number, name in enumerate(names)}
    for name, data in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path, names):
    with zipfile.ZipFile(path, "w") as file:
        for number, name in enumerate(names):
            info = zipfile.ZipInfo()
            info.filename = name  # As it is: the constructor changes some.
            file.writestr(info, b"" if name.endswith(("/", "\\")) else image(number))
    return path


def labels_in(place, split, **settings):
    """{name: class, or number where there are no names} of a split."""
    source = open_source(place, split, **settings)
    return {name: source.classes[label] if source.classes else label for name, label, _ in rows_of(source)}


def everything(place):
    """The same of all splits, as prepare stores them."""
    contents = read_contents(place)
    return {
        split: {e.name: contents.classes[e.label] if isinstance(contents.classes, tuple) else e.label for e in entries}
        for split, entries in contents.splits.items()
    }


def text_of(place):
    """What prepare says about a place."""
    return "\n".join(note.text for note in read_contents(place).notes)


# One reading of a folder

CAT = {"cat/0.jpg": "cat"}
PETS = CAT | {"dog/1.jpg": "dog"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["val/cat/0.jpg", "val/dog/1.jpg"], {"val": PETS}),
        (["pets/val/cat/0.jpg", "pets/val/dog/1.jpg", "pets/readme.txt"], {"val": PETS}),
        (["a/b/c/val/cat/0.jpg", "a/b/c/train/cat/0.jpg"], {"val": CAT, "train": CAT}),
        (["Train/cat/0.jpg", "Test/cat/0.jpg"], {"Train": CAT, "Test": CAT}),
        (["train/cat/0.jpg", "valid/cat/0.jpg", "test/cat/0.jpg"], {"train": CAT, "valid": CAT, "test": CAT}),
        (["training/cat/0.jpg", "testing/cat/0.jpg"], {"training": CAT, "testing": CAT}),
        (["fold1/cat/0.jpg", "fold1/dog/1.jpg", "fold2/cat/0.jpg", "fold2/dog/1.jpg"], {"fold1": PETS, "fold2": PETS}),
        (["train/train/cat/0.jpg", "train/train/dog/1.jpg"], {"train": PETS}),
        (["train/cat/0.jpg", "extra/cat/0.jpg", "figures/a/1.png"], {"train": CAT, "extra": CAT}),
        # Kaggle's chest X-rays hold a second copy of themselves.
        (["x/train/cat/0.jpg", "x/val/cat/0.jpg", "x/x/train/cat/0.jpg", "__MACOSX/._x"], {"train": CAT, "val": CAT}),
        (["val/.cat/0.jpg", "val/cat/0.jpg", "val/@eaDir/0.jpg", "val/Thumbs.db", "val/cat/DESKTOP.INI"], {"val": CAT}),
        (["val/cat/deep/er/0.JPG"], {"val": {"cat/deep/er/0.JPG": "cat"}}),
    ],
)
def test_splits_and_classes_of_folders(files, expected, tmp_path):
    root = put(tmp_path / "set", files)
    assert everything(root) == expected
    assert {split: labels_in(root, split) for split in expected} == expected
    assert everything(zipped(tmp_path / "set.zip", files)) == expected


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["train/cat/0.jpg", "val/0.jpg"], "val holds 1 image, but no class folders"),
        (["0.jpg", "1.jpg"], "holds 2 images, but no class folders"),
        (["birds/robin/0.jpg", "mammals/fox/0.jpg"], "folders of folders, like birds/robin"),
        (["train/Cat/0.jpg", "val/cat/0.jpg"], "'Cat' and 'cat', which differ only in case"),
        (["train/cat/0.jpg", "train/cat /0.jpg"], "'cat' and 'cat '"),
        (["train/café/0.jpg", f"val/{unicodedata.normalize('NFD', 'café')}/0.jpg"], "or Unicode form"),
        (["Cat/0.jpg", "cat/1.jpg", "dog/1.jpg"], "'Cat' and 'cat'"),
        (["val/ca\nt/0.jpg"], "is not a valid name for a class"),
        (["val/ /0.jpg"], "is not a valid name for a class"),
        (["val/cat/a.txt"], "holds no images"),
        ([], "holds no images"),
    ],
)
def test_what_cannot_be_told_is_refused(files, told, tmp_path):
    root = put(tmp_path, files)
    with pytest.raises(InputError) as refused:
        read_contents(root)
    assert told in str(refused.value)


def test_single_letters_in_both_cases_are_classes(tmp_path):
    """Data sets of handwriting have them."""
    root = put(tmp_path, ["train/A/0.jpg", "train/a/0.jpg", "val/a/0.jpg"])
    assert everything(root) == {"train": {"A/0.jpg": "A", "a/0.jpg": "a"}, "val": {"a/0.jpg": "a"}}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "100", "1"], ["1", "9", "10", "100"]),
        (["-1", "0", "1.5", "10"], ["-1", "0", "1.5", "10"]),
        (["02", "1", "10"], ["1", "02", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["n10", "n9"], ["n10", "n9"]),
    ],
)
def test_classes_are_sorted_as_numbers_if_all_are_numbers(names, order, tmp_path):
    root = put(tmp_path, [f"train/{name}/0.jpg" for name in names])
    assert list(open_source(root, "train").classes) == order == list(read_contents(root).classes)


def test_numbers_as_names_are_reported_where_they_meet_labels_without_names(tmp_path):
    root = put(tmp_path / "a", [f"val/{name}/0.jpg" for name in range(1, 12)])
    (note,) = open_source(root, "val", num_classes=11).notes
    assert "label 0 is class 1, 1 is class 2" in note.text and note.level > 20
    assert not open_source(root, "val", num_classes=11, classes=tuple(map(str, range(1, 12)))).notes
    put(root, {"meta/test.txt": b"0.jpg 3\n", "test/0.jpg": image(0)})
    assert "labels have no names" in open_source(root, "test", num_classes=11, classes=("1", "2")).notes[0].text
    assert "labels without names" in text_of(root)


def test_labels_are_the_same_for_all_splits_of_a_folder(tmp_path):
    root = put(tmp_path, ["train/b/0.jpg", "train/d/0.jpg", "val/d/0.jpg", "test/a/0.jpg", "test/d/0.jpg"])
    assert open_source(root, "val").classes == ("b", "d") and open_source(root, "val")[0].label == 1
    assert open_source(root, "test").classes == ("b", "d", "a") == read_contents(root).classes
    assert "train in" in text_of(root) and "lacks classes of other splits: 1 (a)" in text_of(root)
    assert not open_source(root, "train").notes


def test_classes_in_another_spelling_than_the_models_are_named(tmp_path):
    root = put(tmp_path, ["val/Cat/0.jpg"])
    with pytest.raises(InputError, match="'Cat' where the model has 'cat'"):
        open_source(root, classes=("cat", "dog"))


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        (b"a/0.jpg 1\nb/1.jpg 0\n", {"a/0.jpg": 1, "b/1.jpg": 0}),
        (b"\xef\xbb\xbfa/0.jpg 1\r\n\r\nb/1.jpg\t0", {"a/0.jpg": 1, "b/1.jpg": 0}),
        (b"  a/0.jpg   1  \n", {"a/0.jpg": 1}),
        (b"./a/0.jpg 1\n", {"./a/0.jpg": 1}),
    ],
)
def test_lists_win_over_folders(listing, expected, tmp_path):
    files = {"val/a/0.jpg": image(0), "val/b/1.jpg": image(1), "meta/val.txt": listing, "meta/synsets.txt": b"n1\n"}
    root = put(tmp_path / "set", files)
    assert everything(root) == {"val": expected}
    assert labels_in(root, None) == expected
    assert ("not in the list (b/1.jpg)" in text_of(root)) == (len(expected) == 1)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for name, data in files.items():
            file.writestr(f"top/{name}", data)
    assert labels_in(tmp_path / "set.zip", "val") == expected


def test_lists_take_names_from_class_folders_of_other_splits_or_are_refused(tmp_path):
    root = put(tmp_path, ["train/a/0.jpg", "train/b/0.jpg", "val/0.jpg"])
    put(root, {"meta/val.txt": b"0.jpg 1\n"})
    assert everything(root)["val"] == {"0.jpg": "b"} and "label 0 is a, 1 is b" in text_of(root)
    put(root, {"meta/val.txt": b"0.jpg 2\n"})
    with pytest.raises(InputError, match="the label 2, but other splits have 2 class folders"):
        read_contents(root)


def test_lists_without_their_images_are_left_out_of_data_sets(tmp_path):
    root = put(tmp_path, {"train/a/0.jpg": image(0), "meta/test.txt": b"0.jpg 0\n"})
    assert set(everything(root)) == {"train"} and "split test" in text_of(root) and "missing" in text_of(root)


IMAGENET = {f"train/n0144076{i}/n0144076{i}_{i}.JPEG": image(i) for i in (4, 7)}


def test_a_list_with_two_labels_of_one_image_is_refused(tmp_path):
    root = put(tmp_path, {"val/0.jpg": image(0), "meta/val.txt": b"0.jpg 1\n0.jpg 01\n./0.jpg 2\n"})
    with pytest.raises(InputError, match=r"line 3 of .*val.txt gives ./0.jpg the label 2, but a line before it 1"):
        open_source(root)


@pytest.mark.parametrize("label", ["-1", "x", "1.0", "1000000", "\u0663", "9" * 5000])
def test_a_label_that_no_network_has_is_refused(label, tmp_path):
    root = put(tmp_path, {"val/0.jpg": image(0), "meta/val.txt": f"0.jpg {label}\n".encode()})
    with pytest.raises(InputError, match=r"line 1 of .* with a label from 0 to 999999"):
        open_source(root)


def test_names_of_ignored_files_break_no_line(tmp_path):
    root = put(tmp_path, ["val/cat/0.jpg", "val/cat/a\nb\x1b[2J.txt"])
    assert r"image (cat/a\nb\x1b[2J.txt)" in text_of(root)


def test_folders_are_taken_for_splits_with_a_warning_where_their_names_do_not_say_so(tmp_path):
    root = put(tmp_path, [f"{fold}/{name}/0.jpg" for fold in ("cat", "dog") for name in ("indoor", "outdoor")])
    assert set(everything(root)) == {"cat", "dog"}
    (note,) = read_contents(root).notes
    assert "taken for splits" in note.text and "2 (cat, dog)" in note.text and note.level > 20
    assert not open_source(root, "cat").notes  # Its user says that it is a split.


def test_what_lies_beside_the_official_tars_is_reported(tmp_path):
    root = put(tmp_path, ["train/n01440764/0.JPEG", "1.JPEG"])
    tar_of(root / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": image(0)})
    (root / "ILSVRC2012_devkit_t12.tar.gz").touch()
    assert set(everything(root)) == {"validation"}
    assert "1 beside the tars (1.JPEG)" in text_of(root)
    assert "1 outside the splits (train/n01440764/0.JPEG)" in text_of(root)


def test_kaggles_imagenet_is_understood_with_all_that_lies_in_it(tmp_path):
    inside = {f"ILSVRC/Data/CLS-LOC/{name}": data for name, data in IMAGENET.items()}
    inside |= {
        "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": image(1),
        "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG": image(2),
        "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": b"",
        "ILSVRC/ImageSets/CLS-LOC/val.txt": b"ILSVRC2012_val_00000001 1\n",
        "LOC_val_solution.csv": b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01440767 111 108 441 193 \n",
    }
    root = put(tmp_path / "kaggle", inside)
    for place in (root, root / "ILSVRC", root / "ILSVRC/Data/CLS-LOC"):
        assert everything(place)["val"] == {"ILSVRC2012_val_00000001.JPEG": "n01440767"}
        assert labels_in(place, "val") == everything(place)["val"]
        assert set(everything(place)) == {"train", "val"} and "split test" in text_of(place)
    with tarfile.open(tmp_path / "kaggle.tar.gz", "w:gz") as file:
        file.add(root, "kaggle")
    assert everything(tmp_path / "kaggle.tar.gz") == everything(root)
    # Without the table the challenge's own list has the labels; the first image's is this.
    (root / "LOC_val_solution.csv").unlink()
    assert everything(root)["val"] == {"ILSVRC2012_val_00000001.JPEG": "n01751748"}
    assert everything(root / "ILSVRC/Data/CLS-LOC/val")["validation"] == everything(root)["val"]


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
@pytest.mark.parametrize("decoder", ["cv2", "pillow"])
def test_every_suffix_is_that_of_a_format_that_both_decoders_read(suffix, decoder, tmp_path):
    bitmap = Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (8, 6))
    bitmap.save(tmp_path / f"a{suffix}")
    assert decode((tmp_path / f"a{suffix}").read_bytes(), decoder).shape == (6, 8, 3)


def test_links_are_followed_without_loops_and_broken_ones_are_named(tmp_path):
    put(tmp_path / "store", ["0.jpg", "more/1.jpg"])
    root = put(tmp_path / "set", ["val/cat/2.jpg", "val/dog/3.jpg"])
    (root / "val/cat/0.jpg").symlink_to(tmp_path / "store/0.jpg")
    (root / "val/cat/more").symlink_to(tmp_path / "store/more")
    (root / "val/cat/gone.jpg").symlink_to("nowhere")
    (root / "val/cat/circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(root / "val/cat/pipe.jpg")
    for loop, target in {
        "val/cat/here": ".",
        "val/loop": "..",
        "val/dog/up": tmp_path,
        "val/dog/cat": "../cat",
    }.items():
        (root / loop).symlink_to(target)
    (root / "val/cat/dog").symlink_to("../dog")
    names = ["cat/0.jpg", "cat/2.jpg", "cat/dog/3.jpg", "cat/more/1.jpg"]
    assert list(labels_in(root, "val"))[:4] == names
    assert set(labels_in(root, "val").values()) == {"cat", "dog"}
    told = text_of(root)
    assert (
        "behind a broken link (cat/circle.jpg, cat/gone.jpg" in told and "neither file nor folder (cat/pipe.jpg" in told
    )
    moved = tmp_path / "other"
    moved.symlink_to(root)
    assert everything(moved) == everything(root)


def test_a_folder_of_links_in_circles_ends(tmp_path):
    """Eight folders that all lead to each other have thousands of paths, but each class has each image once."""
    for name in "abcdefgh":
        put(tmp_path, [f"val/{name}/{name}.jpg"])
    for name in "abcdefgh":
        for other in set("abcdefgh") - {name}:
            (tmp_path / "val" / name / other).symlink_to(f"../{other}")
    assert len(open_source(tmp_path, "val")) == 64


# Archives


@pytest.mark.parametrize(
    "names",
    [
        ["val/cat/0.jpg", "val/dog/1.jpg"],
        ["val/", "val/cat/", "val/cat/0.jpg", "val/dog/1.jpg"],
        ["pets\\val\\cat\\0.jpg", "pets\\val\\dog\\1.jpg"],
        ["val\\", "val\\cat\\", "val\\cat\\0.jpg", "val\\dog\\1.jpg"],
        ["./val/./cat/0.jpg", "val//dog/1.jpg"],
        ["val/cat/0.jpg", "val/dog/1.jpg", "../../cat/2.jpg", "/val/cat/2.jpg"],
        ["__MACOSX/val/cat/._0.jpg", "val/cat/0.jpg", "val/dog/1.jpg"],
        ["val/cat/0.jpg", "val/dog/1.jpg", "val/cat/0.jpg"],
    ],
)
def test_zips_however_they_were_packed(names, tmp_path):
    with pytest.warns(UserWarning) if names.count("val/cat/0.jpg") > 1 else nullcontext():
        place = zipped(tmp_path / "pets.zip", names)
    assert everything(place) == {"val": PETS}
    assert {name: len(data) > 0 for name, _, data in rows_of(open_source(place))} == dict.fromkeys(PETS, True)
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(
    ("raw", "extra", "name"),
    [
        ("größe".encode(), b"", "größe"),  # As macOS packs, without the flag that says so.
        ("größe".encode("cp437"), b"", "größe"),
        ("猫".encode("cp932"), "猫".encode(), "猫"),  # As 7-Zip and WinRAR pack.
        ("猫".encode("cp932"), b"", "猫".encode("cp932").decode("cp437")),
    ],
)
def test_zips_of_any_code_page(raw, extra, name, tmp_path):
    written = b"val/" + raw + b"/0.jpg"
    stand_in = "x" * len(written)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo(stand_in)
        if extra:
            field = b"\1" + struct.pack("<I", zlib.crc32(written)) + b"val/" + extra + b"/0.jpg"
            info.extra = struct.pack("<HH", archives.UNICODE_PATH, len(field)) + field
        file.writestr(info, image(0))
    data = (tmp_path / "a.zip").read_bytes().replace(stand_in.encode(), written)
    (tmp_path / "a.zip").write_bytes(data)
    ((found, label),) = labels_in(tmp_path / "a.zip", "val").items()
    assert (found, label) == (f"{name}/0.jpg", name)
    assert rows_of(open_source(tmp_path / "a.zip"))[0][2] == image(0)


def test_the_name_of_a_file_does_not_change_that_of_its_folder(tmp_path):
    """Of one folder a file's name is UTF-8, another one's in a code page."""
    folder, names = "größe", ["ä.jpg".encode(), "ä.jpg".encode("cp437")]
    stand_ins = [f"val/{'x' * len(folder.encode())}/{'yz'[i] * len(name)}" for i, name in enumerate(names)]
    data = zipped(tmp_path / "a.zip", stand_ins).read_bytes()
    for stand_in, name in zip(stand_ins, names, strict=True):
        data = data.replace(stand_in.encode(), f"val/{folder}/".encode() + name)
    (tmp_path / "a.zip").write_bytes(data)
    assert set(labels_in(tmp_path / "a.zip", "val").values()) == {folder}


FORKED = """
import os, sys
from shufflenet_jax.data.folders import open_folder
entries = open_folder(sys.argv[1]).splits["val"]().entries
expected = [entry.location.read() for entry in entries]
children = []
for _ in range(4):
    children.append(os.fork())
    if not children[-1]:
        same = all(entry.location.read() == data for _ in range(20) for entry, data in zip(entries, expected))
        os._exit(0 if same else 1)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_processes_that_are_forked_do_not_disturb_each_other_in_a_zip(tmp_path):
    """A loader that forks, like PyTorch's, would move one position in the file from all its workers."""
    place = zipped(tmp_path / "a.zip", [f"val/cat/{i}.jpg" for i in range(50)])
    done = subprocess.run([sys.executable, "-c", FORKED, place], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_open_a_zip_once(tmp_path):
    place = zipped(tmp_path / "a.zip", [f"val/cat/{i}.jpg" for i in range(3000)])
    start = threading.Barrier(8)

    def opened(_):
        start.wait()
        return open_zip(str(place))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(opened, range(8)))) == 1


def test_a_zip_that_was_written_anew_is_read_anew(tmp_path):
    assert everything(zipped(tmp_path / "a.zip", ["val/cat/0.jpg"])) == {"val": CAT}
    assert everything(zipped(tmp_path / "a.zip", ["val/cat/0.jpg", "val/dog/1.jpg"])) == {"val": PETS}


def test_the_same_name_twice_is_reported(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        place = zipped(tmp_path / "a.zip", ["val/cat/0.jpg", "val/dog/1.jpg", "val/cat/0.jpg"])
    assert "1 replaced by a later one of the same name (cat/0.jpg)" in text_of(place)
    assert rows_of(open_source(place))[0][2] == image(2)


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    members = {"val/cat/0.jpg": image(0), "val/dog/1.jpg": image(1)}
    inner = zipped(tmp_path / "inner.zip", ["val/emu/0.jpg"]).read_bytes()
    assert everything(tar_of(tmp_path / "a.tar", members | {"labels.zip": inner})) == {"val": PETS}


def locked(data):
    start = data.index(b"PK\x01\x02")
    return data[: start + 8] + b"\x01\x00" + data[start + 10 :]


@pytest.mark.parametrize(
    ("form", "change", "told"),
    [
        ("zip", locked, "needs a password"),
        ("zip", lambda data: data[: len(data) // 2] + data[-22:], "is damaged"),
        ("zip", lambda data: data[: len(data) // 2], "the end of the zip is missing"),
        ("tar", lambda data: data[: len(data) // 2 - 700], "is damaged"),
        ("tar", lambda data: data + data, "continues after its end"),
        ("tar.gz", lambda data: data[:-20], "is damaged"),
        ("tar.gz", lambda data: data[:100] + bytes(20) + data[120:], "is damaged"),
        ("tar.bz2", lambda data: data[:-20], "is damaged"),
        ("tar.xz", lambda data: data[:-20], "is damaged"),
        ("tar.gz", lambda data: gzip.compress(b"no tar"), "is damaged"),
        ("tar.gz", lambda data: gzip.compress(bytes(10_000)), "holds no images"),
        ("tar", lambda data: b"no tar", "no folder, zip or tar"),
    ],
)
def test_damaged_and_locked_archives_give_one_line(form, change, told, tmp_path, refused):
    root = put(tmp_path / "set", [f"val/{name}/{i}.jpg" for name in "ab" for i in range(30)])
    place = tmp_path / f"set.{form}"
    shutil.make_archive(root, {"tar.gz": "gztar", "tar.bz2": "bztar", "tar.xz": "xztar"}.get(form, form), root)
    place.write_bytes(change(place.read_bytes()))
    assert told in refused(prepare.main, "--source", place, "--name", "a", "--out", tmp_path / "out", "--processes", 1)
    assert str(place) in refused(verify.main, place)
    assert not (tmp_path / "out").exists()


def tar_of(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                file.addfile(info)
    return path


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"../../escape/0.jpg": image(2)}, "leads outside"),
        ({"/escape/0.jpg": image(2)}, "leads outside"),
        ({"val/cat/9.jpg": (tarfile.SYMTYPE, "/etc/passwd")}, "broken link"),
        ({"val/cat/9.jpg": (tarfile.SYMTYPE, "../../../escape.jpg")}, "broken link"),
        ({"val/cat/9.jpg": (tarfile.LNKTYPE, "../escape.jpg")}, "broken link"),
        ({"val/cat/9.jpg": (tarfile.CHRTYPE, "")}, "neither file nor folder"),
        ({"val/cat/loop": (tarfile.SYMTYPE, "..")}, ""),
        ({"val/cat/.9.jpg": image(2)}, "hidden"),
    ],
)
def test_no_member_of_a_tar_leads_outside(members, told, tmp_path):
    place = tar_of(tmp_path / "a.tar", {"val/cat/0.jpg": image(0), "val/dog/1.jpg": image(1)} | members)
    assert everything(place) == {"val": PETS} and told in text_of(place)
    assert list(tmp_path.iterdir()) == [place]


def test_links_in_a_tar_lead_to_its_members(tmp_path):
    links = {
        ".store/a1": image(7),
        "val/cat/stored.jpg": (tarfile.SYMTYPE, "../../.store/a1"),
        "val/cat/lost.jpg": (tarfile.SYMTYPE, "../../.store/a2"),
        "val/cat/hard.jpg": (tarfile.LNKTYPE, "val/dog/1.jpg"),
        "val/cat/soft.jpg": (tarfile.SYMTYPE, "../dog/1.jpg"),
        "val/emu": (tarfile.SYMTYPE, "./dog"),
    }
    place = tar_of(tmp_path / "a.tar", {"val/cat/0.jpg": image(0), "val/dog/1.jpg": image(1)} | links)
    found = {name: (label, data) for name, label, data in rows_of(open_source(place))}
    assert found["cat/hard.jpg"] == found["cat/soft.jpg"] == (0, image(1)) and found["emu/1.jpg"] == (2, image(1))
    assert found["cat/stored.jpg"] == (0, image(7)) and "broken link (cat/lost.jpg)" in text_of(place)


def test_padding_behind_a_tar_is_no_damage(tmp_path):
    place = tar_of(tmp_path / "a.tar", {"val/cat/0.jpg": image(0), "val/dog/1.jpg": image(1)})
    place.write_bytes(place.read_bytes() + bytes(2**21))
    assert everything(place) == {"val": PETS}


def test_a_cache_without_room_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(tmp_path / "cache"))
    root = put(tmp_path / "set", ["val/cat/0.jpg", "val/dog/1.jpg"])
    shutil.make_archive(root, "gztar", root)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        with pytest.raises(InputError, match=r"archives.* cannot be written: File too large"):
            open_source(tmp_path / "set.tar.gz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_file_that_cannot_be_read_is_called_so():
    """Linux has files that no one may read at their beginning."""
    with pytest.raises(InputError, match="/proc/self/mem cannot be read: Input/output error"):
        open_source("/proc/self/mem")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_is_named(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as file:
        file.writestr("val/cat/0.jpg", os.urandom(3000))
    data = (tmp_path / "a.zip").read_bytes()
    for start in (45, 60, 1000):
        (tmp_path / "a.zip").write_bytes(data[:start] + bytes(9) + b"\xff" * 40 + data[start + 49 :])
        with pytest.raises(InputError, match=r"val/cat/0\.jpg cannot be read"):
            open_source(tmp_path / "a.zip")[0]


def test_a_compressed_tar_is_unpacked_once_and_only_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHUFFLENET_JAX_CACHE", str(tmp_path / "cache"))
    root = put(tmp_path / "set", ["val/cat/0.jpg", "val/dog/1.jpg"])
    shutil.make_archive(root, "gztar", root)
    assert everything(tmp_path / "set.tar.gz") == {"val": PETS}
    (copy,) = (tmp_path / "cache/archives").glob("*.tar")
    written = copy.stat().st_mtime_ns
    assert everything(tmp_path / "set.tar.gz") == {"val": PETS} and copy.stat().st_mtime_ns == written
    monkeypatch.setattr(archives, "MOST_UNPACKED", -(10**9))
    os.utime(tmp_path / "set.tar.gz", (1, 1))
    with pytest.raises(InputError, match="unpacks to more than"):
        open_source(tmp_path / "set.tar.gz")
    assert len(list((tmp_path / "cache/archives").glob("*.tar"))) == 1


# Folders without splits


@pytest.mark.parametrize(
    ("counts", "share", "held_out"),
    [
        ({"a": 10, "b": 20}, 0.2, {"a": 2, "b": 4}),
        ({"a": 2, "b": 2}, 0.2, {"a": 1, "b": 1}),
        ({"a": 1, "b": 2}, 0.2, {"b": 1}),
        ({"a": 3, "b": 100}, 0.01, {"a": 1, "b": 1}),
        ({"a": 3, "b": 2}, 0.99, {"a": 2, "b": 1}),
        ({"a": 7, "b": 0}, 0.5, {"a": 4}),
        ({"1": 5, "2": 5, "10": 5}, 0.2, {"1": 1, "2": 1, "10": 1}),
        ({"cat": 4, "meta": 4}, 0.25, {"cat": 1, "meta": 1}),
    ],
)
def test_a_share_of_each_class_of_a_flat_folder_is_held_out(counts, share, held_out, tmp_path):
    root = put(tmp_path / "set", [f"{name}/{i}.jpg" for name, count in counts.items() for i in range(count)])
    for name in counts:
        (root / name).mkdir(exist_ok=True)
    val, train = (labels_in(root, split, val_share=share) for split in ("val", "train"))
    assert {name: list(val.values()).count(name) for name in set(val.values())} == held_out
    assert not set(val) & set(train) and len(val) + len(train) == sum(counts.values())
    assert open_source(root).classes == open_source(root, "train").classes == tuple(counts)
    shutil.make_archive(tmp_path / "set", "zip", tmp_path, "set")
    assert labels_in(tmp_path / "set.zip", "val", val_share=share) == val


def test_what_is_held_out_is_the_same_on_every_host_and_every_day():
    """A value from the day this was written; Unicode forms differ between file systems."""
    names = [f"cat/{i}.jpg" for i in range(20)] + ["cat/größe.jpg"]
    assert sorted(hold_out(names, 0.2)) == HELD_OUT
    other = [unicodedata.normalize("NFD", name) for name in reversed(names)]
    assert {unicodedata.normalize("NFC", name) for name in hold_out(other, 0.2)} == set(HELD_OUT)


HELD_OUT = ["cat/13.jpg", "cat/3.jpg", "cat/8.jpg", "cat/größe.jpg"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["a/0.jpg", "b/0.jpg"], "no class has two images"),
        (["a/0.jpg", "b/0.jpg", "c.jpg"], "no class has two images"),
        (["a/x.txt", "b/y.txt"], "none of the splits"),
    ],
)
def test_flat_folders_with_too_little_are_refused(files, told, tmp_path):
    with pytest.raises(InputError, match=told):
        open_source(put(tmp_path, files))


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_shares_that_leave_nothing_are_refused(share, tmp_path):
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        open_source(tmp_path, val_share=share)
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        TrainConfig(data="x", val_share=share)


@pytest.fixture
def flat(tmp_path):
    """Ten classes as the fixture ten_classes has them, without splits, and files beside the images."""
    root = put(tmp_path / "flat", [f"kind{kind}/{i}.jpg" for kind in range(10) for i in range(5)])
    return put(
        root, {"notes.txt": b"", "tables/labels.csv": b"", ".DS_Store": b"", "kind0/x.txt": b"", "stray.jpg": b""}
    )


DECIDED = "held out 10 of 50 images (20 %) as val by a hash of class and file name; classes: 10 (kind0,"
SKIPPED = (
    "1 hidden or system, 3 without the suffix of an image (notes.txt, tables/labels.csv, kind0/x.txt), "
    "1 outside class folders (stray.jpg)"
)


def test_every_command_reports_what_it_decided_and_skipped(flat, ten_classes, tmp_path, call):
    commands = {
        "verify": (verify.main, flat),
        "prepare": (prepare.main, "--source", flat, "--name", "pets", "--out", tmp_path / "out", "--processes", 1),
        "eval": (evaluate.main, "--checkpoint", ten_classes[0], "--data", flat),
    }
    for name, words in commands.items():
        status, out, stderr = call(*words)
        assert status == 0, stderr
        assert DECIDED in stderr and f"warning: skipped: 5 files of {flat}: " in stderr, (name, stderr)
        assert SKIPPED in stderr
        if name != "prepare":
            assert figures_of(out)["images"] == 10
    assert figures_of(call(verify.main, flat)[1])["skipped"] == 5
    assert figures_of(call(verify.main, flat, "--val-share", 0.4)[1])["images"] == 20
    assert (
        figures_of(call(verify.main, "tfds:pets", "--data-dir", tmp_path / "out", "--split", "train")[1])["images"]
        == 40
    )


def test_a_training_reports_once_and_older_workdirs_have_the_share(flat, caplog):
    config = TrainConfig(data=str(flat))
    with caplog.at_level("INFO"):
        train, evaluated = open_sources(config)
    assert (len(train), len(evaluated)) == (40, 10)
    ours = [record.message for record in caplog.records if record.name.startswith("shufflenet_jax")]
    assert [message.partition(" ")[0] for message in ours] == ["no", "skipped:"]
    assert current_settings({"data": "x"})["val_share"] == 0.2


@pytest.mark.parametrize(("listed", "whose"), [("train", "training"), ("val", "evaluation")])
def test_a_training_with_names_on_one_side_and_a_list_on_the_other_says_what_it_takes_for_what(
    listed, whose, tmp_path, caplog
):
    root = put(tmp_path, [f"{split}/{name}/0.jpg" for split in ("train", "val") for name in ("cat", "dog")])
    open_sources(TrainConfig(data=str(root)))
    assert not caplog.records
    put(root, {f"meta/{listed}.txt": b"cat/0.jpg 1\ndog/0.jpg 0\n"})
    open_sources(TrainConfig(data=str(root)))
    (record,) = caplog.records
    assert f"labels for {whose} in {root} have no names" in record.message and record.levelname == "WARNING"
    assert record.message.endswith("label 0 is cat, label 1 is dog")


def test_eval_holds_out_what_the_training_held_out(flat, ten_classes, tmp_path, call):
    model = shutil.copytree(ten_classes[0], tmp_path / "model")
    stored = json.loads((model / "model.json").read_text())
    stored["source"]["config"] = {"val_share": 0.4}
    (model / "model.json").write_text(json.dumps(stored))
    assert figures_of(call(evaluate.main, "--checkpoint", model, "--data", flat)[1])["images"] == 20


def test_predict_sees_the_images_of_a_folder_and_reports_the_rest(flat, ten_classes, call):
    (flat / "stray.jpg").unlink()
    shutil.rmtree(flat / "kind1")
    names, _ = find_images(flat)
    assert len(names) == 45 and names == sorted(names)
    for name in names[2:]:
        os.unlink(name)
    status, out, stderr = call(predict.main, flat, "--checkpoint", ten_classes[0], "--json")
    assert status == 0 and [json.loads(line)["image"] for line in out.splitlines()] == names[:2]
    others = "kind0/x.txt, notes.txt, tables/labels.csv"
    assert stderr == f"skipped: 4 files of {flat}: 1 hidden or system, 3 without the suffix of an image ({others})\n"


def test_a_data_set_begun_with_other_images_is_not_continued(flat, tmp_path, call):
    argv = ("--source", flat, "--name", "pets", "--out", tmp_path / "out", "--processes", 1)
    (flat / "kind0/0.jpg").write_bytes(b"no image")
    status, _, stderr = call(prepare.main, *argv)
    assert status == 2 and "kind0/0.jpg is damaged" in stderr
    (flat / "kind0/9.jpg").write_bytes(image(9))
    status, _, stderr = call(prepare.main, *argv)
    assert status == 2 and "another source, other images or options" in stderr


@pytest.mark.real_data
def test_trashnet_is_split_evenly(shared):
    place = shared / "trashnet/trashnet.zip"
    train, val = open_source(place, "train"), open_source(place)
    counts = {label: (list(val.labels()).count(label), list(train.labels()).count(label)) for label in range(6)}
    assert (len(train) + len(val), len(val), val.num_classes) == (2527, 505, 6)
    assert all(abs(held / (held + rest) - 0.2) < 0.005 for held, rest in counts.values())  # Rounding of 137 images.


# Random folders


@pytest.mark.parametrize("seed", range(12))
def test_every_reader_sees_what_a_random_folder_holds(seed, tmp_path):
    random_trees.check(seed, tmp_path / "case")
