"""Models for people who want predictions: a network, its weights and the way its images are prepared, in one object."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from .architecture import TABLES
from .checkpoint import FIXED, module_of
from .config import ModelInfo, require_whole_number
from .data import geometry
from .data.labels import class_name, imagenet_classes
from .deploy import Deployed, compile_deployed, deploy
from .errors import InputError, Unchecked
from .files import path_of, read_file
from .forward import forward
from .loading import adapt_channels, load_model
from .model import ShuffleNetV2, describe, init_variables
from .porting import dialects
from .published import PUBLISHED, find
from .shapes import Array, Features, Logits, Variables


class Model:
    """A network that predicts.

    Attributes:
      module: a ShuffleNetV2.
      variables: its {"params", "batch_stats"}, as NumPy arrays.
      info: a ModelInfo: the classes, and how images are prepared.
    """

    def __init__(self, module: ShuffleNetV2, variables: Variables, info: ModelInfo) -> None:
        self.module, self.variables, self.info = module, variables, info

    def __repr__(self) -> str:
        (height, width), channels = self.info.preprocess.size, self.info.in_chans
        return f"<Model: ShuffleNetV2 {describe(self.module)}, for images of {height} x {width} x {channels}>"

    def __call__(self, images: Unchecked) -> Logits:
        """Return the logits (B, num_classes) of images.

        Args:
          images: (B, H, W, C): uint8 in RGB or grey from `preprocess`, or floats that are normalized as the network
            takes them.

        Raises:
          InputError: the images have another type or shape, or there is no classifier.
        """
        if not self.info.num_classes:
            raise InputError("the model has no classifier; use extract_feat, or get_model with num_classes")
        logits, _ = self.outputs(images)
        assert logits is not None  # There is a classifier.
        return logits

    def extract_feat(self, images: Unchecked) -> Features:
        """Return {"stem", "stage2", "stage3", "stage4", "conv5": (B, h, w, C), "pooled": (B, C)} of images.

        Args:
          images: as for a call.

        Raises:
          InputError: the images have another type or shape.
        """
        return self.outputs(images)[1]

    def preprocess(self, image: Unchecked, *, name: str | None = None) -> UInt8[np.ndarray, "1 height width channels"]:
        """Prepare one image as in evaluation: uint8 (1, H, W, C), ready for the model.

        Args:
          image: a path, encoded bytes, a Pillow image, or a uint8 array (H, W, 3) in RGB or (H, W) in grey. A Pillow
            image of any mode gives the same as a file with its content, EXIF's rotation included.
          name: for error messages; by default its path.

        Raises:
          InputError: it is not an image.
        """
        content, called = _content(image)
        return geometry.prepare(content, self.info.preprocess, name or called)[None]

    def class_name(self, label: int) -> str:
        """Return a class's name for people: ImageNet's by a short name, others as in their data, or the label.

        Args:
          label: of the class.
        """
        return class_name(self.info.classes, label)

    def class_activation_map(
        self, conv5: Float[Array, "height width channels"], label: int
    ) -> Float[Array, "height width"]:
        """Show where a class is visible: the share of each place in its logit (Zhou et al., CVPR 2016).

        Args:
          conv5: features (h, w, C) of an image.
          label: of the class.

        Returns:
          (h, w), from 0, nothing, to 1, the largest share.
        """
        seen = np.maximum(conv5 @ self.variables["params"]["fc"]["kernel"][:, label], 0)
        return seen / max(seen.max(), 1e-12)

    def outputs(self, images: Unchecked) -> tuple[Logits | None, Features]:
        """Return logits and features of images, both at once; a backbone's logits are None.

        Args:
          images: as for a call.

        Raises:
          InputError: the images have another type or shape.
        """
        takes = (
            f"(B, H, W, {self.info.in_chans}), uint8 or floats; give it what preprocess returns, or a batch of these"
        )
        try:
            images = jnp.asarray(images)
        except (TypeError, ValueError) as error:
            raise InputError(f"images are no array of numbers, but the model takes {takes}") from error
        numbers = images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating)
        if not numbers or images.ndim != 4 or images.shape[-1] != self.info.in_chans or 0 in images.shape[1:]:
            raise InputError(f"images are {images.dtype} of shape {images.shape}, but the model takes {takes}")
        return self._apply(self._weights, images)

    @cached_property
    def deployed(self) -> tuple[Deployed, Variables]:
        """The fastest form of the network, and its weights."""
        return deploy(self.module, self.variables)

    @cached_property
    def _weights(self) -> Variables:
        return jax.device_put(self.deployed[1])

    @cached_property
    def _apply(self) -> Callable[[Variables, Array], tuple[Logits | None, Features]]:
        return compile_deployed(partial(forward, self.deployed[0], self.info.preprocess))


def _content(image: Unchecked) -> tuple[bytes | Image.Image | np.ndarray, str]:
    """Return encoded bytes, a Pillow image or a uint8 array of an image, and its name for error messages."""
    if isinstance(image, (str, Path)):
        try:
            return read_file(path_of(image)), str(image)
        except OSError as error:
            raise InputError(f"image {image} cannot be read: {error.strerror}; check the path") from error
    if isinstance(image, bytes):
        return image, "image"
    if isinstance(image, Image.Image):
        return image, str(getattr(image, "filename", "")) or "image"
    wanted = "a path, encoded bytes, a Pillow image, or a uint8 array (H, W, 3) in RGB or (H, W) in grey"
    try:
        pixels = np.asarray(image)
    except ValueError as error:
        raise InputError(f"an image is no array; give {wanted}") from error
    shaped = pixels.ndim in (2, 3) and pixels.shape[2:] in ((), (1,), (3,)) and 0 not in pixels.shape
    if pixels.dtype != np.uint8 or not shaped:
        raise InputError(f"an image is {pixels.dtype} of shape {pixels.shape}; give {wanted}")
    return pixels, "array"


def get_model(
    name: Unchecked,
    pretrained: bool = False,
    *,
    num_classes: Unchecked = None,
    in_chans: Unchecked = None,
    conv5: bool | None = None,
    seed: Unchecked = 0,
    **settings: Unchecked,
) -> Model:
    """Return a model by its published name, or from your own checkpoint.

    Args:
      name: a name of `list_models`, a model directory, a training workdir, one of its numbered checkpoints or a .pth
        file.
      pretrained: load the published weights (downloaded on first use); a name without it gives fresh ones. Your own
        checkpoint always brings its weights.
      num_classes: of a new classifier; None means the checkpoint's, 0 none.
      in_chans: channels of the images. For 1, grey, the first convolution takes the sum of its weights over the colors;
        for others it repeats them and scales them down (see `loading.adapt_channels`). Image files have colors or grey:
        give a model of other channels arrays.
      conv5: False ends the network after stage4, which cannot have a classifier: set `num_classes` to 0.
      seed: of new weights.
      settings: fields of ShuffleNetV2 to change, like `dtype`, `lowering` or `dropout`; for fresh models also
        `channels` and `repeats`.

    Raises:
      InputError: a ValueError whose message is one line; there is no such model, or it cannot be loaded.
    """
    require_whole_number("seed", seed, 0)
    if str(name) in PUBLISHED and not pretrained:
        info = published_info(str(name))
        module = module_of(info, **settings)
        info = dataclasses.replace(info, **{field: getattr(module, field) for field in FIXED})
        variables = init_variables(module, seed=seed)
    else:
        module, variables, info = load_model(name, **settings)
    num_classes = info.num_classes if num_classes is None else num_classes
    in_chans = info.in_chans if in_chans is None else in_chans
    conv5 = info.conv5 if conv5 is None else conv5
    require_whole_number("num_classes", num_classes, 0)
    require_whole_number("in_chans", in_chans, 1)
    num_classes, in_chans = int(num_classes), int(in_chans)  # NumPy's are no numbers for JSON.
    if (num_classes, in_chans, conv5) == (info.num_classes, info.in_chans, info.conv5):
        return Model(module, variables, info)
    return _adapted(module, variables, info, num_classes, in_chans, conv5, seed)


def published_info(name: str) -> ModelInfo:
    """Return the model description of published weights, without a download.

    Args:
      name: a key of PUBLISHED.
    """
    published = find(name)
    rules = dialects.DIALECTS[published.source.lower()]
    return ModelInfo(
        width=published.width,
        layout=published.layout,
        num_classes=1000,
        preprocess=rules.preprocess_of(TABLES[published.width]),
        classes=tuple(imagenet_classes()),
    )


def _adapted(
    module: ShuffleNetV2, variables: Variables, info: ModelInfo, num_classes: int, in_chans: int, conv5: bool, seed: int
) -> Model:
    """Return the model with another classifier or first convolution, or without conv5."""
    if conv5 and not info.conv5:
        raise InputError("the network ends with stage4, and no weights of conv5 are there; leave conv5 out")
    if num_classes and not conv5:
        raise InputError("the network ends with stage4, where no classifier fits; set num_classes to 0")
    variables, preprocess = adapt_channels(variables, info.preprocess, in_chans)
    params, batch_stats = dict(variables["params"]), dict(variables["batch_stats"])
    changes: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "conv5": conv5}
    module = module.clone(**changes)
    changes |= {"preprocess": preprocess, "sha256": None}
    if num_classes != info.num_classes:
        params.pop("fc", None)
        if num_classes:
            params["fc"] = init_variables(module, seed=seed)["params"]["fc"]
        changes |= {"classes": None, "metrics": None}
    if conv5 != info.conv5:
        del params["conv5"], batch_stats["conv5"]
        changes |= {"metrics": None}
    if in_chans != info.in_chans:
        changes["metrics"] = None
    variables = {"params": params, "batch_stats": batch_stats}
    return Model(module, variables, dataclasses.replace(info, **changes))


def inference_model(model: Unchecked, image: Unchecked) -> dict[str, Any]:
    """Classify one image.

    Args:
      model: a Model, a published name or a checkpoint.
      image: as `Model.preprocess` takes it.

    Returns:
      {"pred_label": int, "pred_class": str, "pred_score": float, "pred_scores": (num_classes,) probabilities}.
    """
    if not isinstance(model, Model):
        model = get_model(model, pretrained=True)
    scores = np.asarray(jax.nn.softmax(model(model.preprocess(image)).astype(jnp.float32)))[0]
    label = int(scores.argmax())
    return {
        "pred_label": label,
        "pred_class": model.class_name(label),
        "pred_score": float(scores[label]),
        "pred_scores": scores,
    }
