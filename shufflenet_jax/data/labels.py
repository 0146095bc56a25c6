"""The 1000 classes of ILSVRC2012 in label order: WNID and a short name, from the challenge's own list."""

from functools import cache
from importlib.resources import files


@cache
def imagenet_classes():
    """{WNID: short name}, in label order."""
    lines = files(__package__).joinpath("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def class_name(classes, label):
    """What people call a class: ImageNet's by its short name, others as their data does; without names, the label."""
    return imagenet_classes().get(classes[label], classes[label]) if classes else str(label)
