"""The model card of a published network: README.md, with a head in YAML that the Hugging Face Hub reads."""

import re
from typing import Any, NamedTuple

import yaml

from ..accounting import count, total
from ..architecture import name_of
from ..checkpoint import module_of
from ..config import ModelInfo
from ..data.labels import imagenet_classes
from ..hub import PREFIX

IMAGENET = "imagenet-1k"  # The data set's name on the Hub, as timm's cards have it.
# fmt: off
# The Hub's names of licences, of those that weights may have; any other is called "other", with a name of its own.
LICENCES = frozenset([
    "apache-2.0", "mit", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0",
    "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc",
    "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "openrail", "osl-3.0", "postgresql", "ofl-1.1", "ncsa",
    "unlicense", "zlib", "pddl", "unknown", "other",
])
# fmt: on


class Statements(NamedTuple):
    """What the publisher states about a network.

    Attributes:
      name: what the network is called.
      address: what loads it: hf-hub:OWNER/NAME, or the name of its folder.
      licence: under which others may use the weights.
      top1: accuracy in percent; None if it was not measured.
      top5: the same for the first five classes.
      data: in words, on which data they were measured.
      datasets: names on the Hub of the data it was trained on; None takes imagenet-1k for ImageNet's classes.
    """

    name: str
    address: str
    licence: str
    top1: float | None = None
    top5: float | None = None
    data: str | None = None
    datasets: tuple[str, ...] | None = None


def card(info: ModelInfo, stated: Statements) -> str:
    """Return the model card, in Markdown.

    Args:
      info: description of the network, with the hash of its variables.
      stated: what the publisher states.
    """
    title = stated.address.removeprefix(PREFIX).rpartition("/")[2]
    table = "\n".join(f"| {name} | {value} |" for name, value in _facts(info, stated).items() if value is not None)
    head = yaml.safe_dump(metadata(info, stated), sort_keys=False, allow_unicode=True)
    return f"""---
{head}---

# {title}

| | |
| --- | --- |
{table}

```python
import shufflenet_jax as snet

model = snet.get_model("{stated.address}")
print(snet.inference_model(model, "image.jpg"))
```
"""


def _facts(info: ModelInfo, stated: Statements) -> dict[str, Any]:
    """Return the rows of the card's table; None is left out."""
    height, width = info.preprocess.size
    summed = total(count(module_of(info), height, width))
    stem = ", small stem" if info.small_stem else ""
    return {
        "network": f"ShuffleNetV2 {name_of(info.table, conv5=info.conv5)}, {info.layout} layout{stem}",
        "classes": info.num_classes or "none: features alone",
        "parameters": f"{summed['parameters']:,}",
        f"multiply-adds at {height} x {width}": f"{summed['multiply_adds'] / 1e6:.1f} M",
        "input": f"short side {info.preprocess.resize}, central {height} x {width}, {info.preprocess.channel_order}",
        "top-1": f"{stated.top1} %" if stated.top1 is not None else None,
        "top-5": f"{stated.top5} %" if stated.top5 is not None else None,
        "measured on": stated.data,
        "source": info.source.get("file") or info.source.get("config", {}).get("data"),
        "began with": info.source.get("config", {}).get("init_from"),
        "licence": stated.licence,
        "sha256 of the variables": info.sha256,
    }


def metadata(info: ModelInfo, stated: Statements) -> dict[str, Any]:
    """Return the fields of the card's head, by the conventions of timm's cards.

    Args:
      info: description of the network.
      stated: what the publisher states.
    """
    licence = stated.licence.lower()
    task = "image-classification" if info.num_classes else "image-feature-extraction"
    datasets = stated.datasets
    if datasets is None and info.classes == tuple(imagenet_classes()):
        datasets = (IMAGENET,)
    began = str(info.source.get("config", {}).get("init_from"))
    measured = stated.top1 is not None or stated.top5 is not None
    fields = {
        "license": licence if licence in LICENCES else "other",
        "license_name": None if licence in LICENCES else re.sub(r"[^a-z0-9.-]+", "-", licence).strip("-") or "other",
        "library_name": "shufflenet_jax",
        "pipeline_tag": task,
        "tags": [task, "shufflenet_jax", "jax", "flax", "shufflenet_v2"],
        "datasets": list(datasets or ()),
        "base_model": began.removeprefix(PREFIX).partition("@")[0] if began.startswith(PREFIX) else None,
        "metrics": ["accuracy"] if measured else [],
        "model-index": [_results(stated, task, datasets or ())] if measured and (stated.data or datasets) else [],
    }
    return {name: value for name, value in fields.items() if value}


def _results(stated: Statements, task: str, datasets: tuple[str, ...]) -> dict[str, Any]:
    """Return an entry of the head's model-index: how accurate the network is, on what."""
    data = stated.data or datasets[0]
    accuracies = {"top-1 accuracy": stated.top1, "top-5 accuracy": stated.top5}
    metrics = [
        {"type": "accuracy", "name": name, "value": round(percent / 100, 6)}  # The Hub's accuracies go from 0 to 1.
        for name, percent in accuracies.items()
        if percent is not None
    ]
    dataset = {"type": next(iter(datasets), "custom"), "name": data}
    return {"name": stated.name, "results": [{"task": {"type": task}, "dataset": dataset, "metrics": metrics}]}
