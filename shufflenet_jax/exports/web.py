"""A page that classifies pictures in the browser: the network in ONNX, onnxruntime-web, and our preprocessing."""

import base64
import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..data.labels import class_name
from ..errors import InputError
from ..evaluation.report import in_words
from ..files import cache_dir, read_file
from ..inference import Model
from ..published import downloaded
from .network import Signature

VERSION = "1.30.0"  # Of onnxruntime-web.
RUNTIME = f"onnxruntime-web {VERSION}"
PLACE = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist"
FILES = {  # {part of the page: (name in the package, sha256)}; they compute only on CPUs.
    "script": ("ort.wasm.bundle.min.mjs", "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90"),
    "binary": ("ort-wasm-simd-threaded.wasm", "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"),
}
MOST_PIXELS = 16_000_000  # Of a picture: phones have no larger canvas.
NAMES = {"network": "model.onnx", **{part: name for part, (name, _) in FILES.items()}}  # In the page's folder.
PAGE = "index.html"
DAMAGED_TAR = (tarfile.TarError, zlib.error, EOFError, OSError, KeyError)  # The errors of tarfile.


def runtime_files(archive: Path | None = None) -> dict[str, bytes]:
    """Return onnxruntime-web's parts of the page, downloaded once into the cache.

    Args:
      archive: the package from `npm pack onnxruntime-web`; None downloads the two required files.

    Raises:
      InputError: it is another version or no package, or the download fails.
    """
    if archive is None:
        folder = cache_dir() / "downloads" / f"onnxruntime-web-{VERSION}"
        return {part: downloaded(name, PLACE, sha256, folder).read_bytes() for part, (name, sha256) in FILES.items()}
    contents = {}
    advice = f"give the package from npm pack onnxruntime-web@{VERSION}"
    try:
        with tarfile.open(fileobj=io.BytesIO(read_file(archive)), mode="r:gz") as package:
            for part, (name, _) in FILES.items():
                member = package.extractfile(f"package/dist/{name}")
                contents[part] = member.read() if member else b""
    except DAMAGED_TAR as error:
        raise InputError(f"{archive} is no package of onnxruntime-web: {error}; {advice}") from error
    for part, (name, sha256) in FILES.items():
        if hashlib.sha256(contents[part]).hexdigest() != sha256:
            raise InputError(f"{archive} is another version of onnxruntime-web: {name} differs; {advice}")
    return contents


def require_classifier(model: Model) -> None:
    """Raise InputError if a page could show nothing: without classes, or with images that browsers do not have.

    Args:
      model: the network.
    """
    if not model.info.num_classes:
        raise InputError("the network has no classifier, and a page shows classes; export a classifier")
    if model.info.preprocess.channel_order == "any":
        raise InputError(f"the network takes {model.info.in_chans} channels, but pictures in a browser have 3 or 1")


def require_own(folder: Path) -> None:
    """Raise InputError if a folder that a page would replace holds other files.

    Args:
      folder: its path.
    """
    others = sorted(path.name for path in folder.iterdir() if path.name not in (PAGE, *NAMES.values()))
    if others:
        raise InputError(f"{folder} holds other files, like {others[0]}, and would be replaced; name another folder")


def page_of(model: Model, signature: Signature, contents: Mapping[str, bytes], *, single: bool) -> str:
    """Return the page's HTML.

    Args:
      model: the network: its classes, and how to prepare images.
      signature: size of the images.
      contents: {part: bytes} of the files that it loads.
      single: inline the files, compressed, instead of naming them.
    """
    info = model.info
    height, width = signature.size or info.preprocess.size
    classes = [class_name(info.classes, label) for label in range(info.num_classes)]
    settings = {
        "preprocess": json.loads(info.to_json())["preprocess"],
        "classes": classes,
        "files": {} if single else NAMES,
        "height": height,
        "width": width,
        "channels": info.preprocess.channels,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    words = in_words(info.preprocess)
    return environment.get_template(
        "web.html"
    ).render(
        settings=Markup(json.dumps(settings).replace("<", "\\u003c")),  # "</script>" would end the script.
        inlined={part: _inlined(content) for part, content in contents.items()} if single else {},
        classes=classes,
        preparation=f"{words[0].upper()}{words[1:]}.",
        source=(info.source or {}).get("file"),
        runtime=RUNTIME,
        most_pixels=MOST_PIXELS,
    )


def _inlined(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def write_page(path: Path, html: str, contents: Mapping[str, bytes], *, single: bool) -> None:
    """Write the page as one file, or as a folder with the files that it loads.

    Args:
      path: of the file or folder.
      html: of the page.
      contents: {part: bytes} of the files that it loads.
      single: whether it is one file.
    """
    if single:
        path.write_text(html, encoding="utf-8")
        return
    path.mkdir()
    for part, content in contents.items():
        (path / NAMES[part]).write_bytes(content)
    (path / PAGE).write_text(html, encoding="utf-8")
