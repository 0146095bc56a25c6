"""Models for people who want predictions: a network, its weights and the way its images are prepared, in one object."""

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from .architecture import TABLES
from .checkpoint import FIXED, module_of
from .config import ModelInfo, require_whole_number
from .data import geometry
from .data.labels import class_name, imagenet_classes
from .deploy import compile_deployed, deploy
from .errors import InputError
from .files import path_of, read_file
from .forward import forward
from .loading import adapt_channels, load_model
from .model import ShuffleNetV2, describe, init_variables
from .porting import dialects
from .published import PUBLISHED, find


class Model:
    """A network that predicts.

    Attributes:
      module: a ShuffleNetV2.
      variables: its {"params", "batch_stats"}, as NumPy arrays.
      info: a ModelInfo: the classes, and how images are prepared.
    """

    def __init__(self, module: ShuffleNetV2, variables: Any, info: ModelInfo) -> None:
        self.module, self.variables, self.info = module, variables, info

    def __repr__(self) -> str:
        (height, width), channels = self.info.preprocess.size, self.info.in_chans
        return f"<Model: ShuffleNetV2 {describe(self.module)}, for images of {height} x {width} x {channels}>"

    def __call__(self, images: Any) -> jax.Array:
        """Logits (B, num_classes) of images (B, H, W, C): uint8 in RGB or grey from `preprocess`, or floats as the
        network takes them, normalised already."""
        if not self.info.num_classes:
            raise InputError("the model has no classifier; use extract_feat, or get_model with num_classes")
        return self.outputs(images)[0]

    def extract_feat(self, images: Any) -> dict[str, jax.Array]:
        """{"stem", "stage2", "stage3", "stage4", "conv5": (B, h, w, C), "pooled": (B, C)} of images as above."""
        return self.outputs(images)[1]

    def preprocess(self, image: Any, *, name: str | None = None) -> np.ndarray:
        """The evaluation transform of one image, uint8 (1, side, side, C), ready for the model.

        Args:
          image: a path, encoded bytes, a Pillow image, or a uint8 array (H, W, 3) in RGB or (H, W) in grey. A Pillow
            image of any mode gives what a file with its content gives, EXIF's rotation included.
          name: what errors call it; by default its path.
        Raises:
          InputError: it is no image.
        """
        content, called = _content(image)
        return geometry.prepare(content, self.info.preprocess, name or called)[None]

    def class_name(self, label: int) -> str:
        """What people call a class: ImageNet's by a short name, others as their data does, or the label."""
        return class_name(self.info.classes, label)

    def class_activation_map(self, conv5: np.ndarray, label: int) -> np.ndarray:
        """Show where a class is seen (Zhou et al., CVPR 2016): what each place of the last features adds to its logit.

        Args:
          conv5: features (h, w, C) of an image.
          label: the class.
        Returns:
          (h, w), from 0, nothing, to 1, most.
        """
        seen = np.maximum(conv5 @ self.variables["params"]["fc"]["kernel"][:, label], 0)
        return seen / max(seen.max(), 1e-12)

    def outputs(self, images: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(logits, features) of images as above, both at once; a backbone's logits are None."""
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
    def deployed(self):
        """(Deployed, its weights): the form that predicts fastest."""
        return deploy(self.module, self.variables)

    @cached_property
    def _weights(self):
        return jax.device_put(self.deployed[1])

    @cached_property
    def _apply(self):
        return compile_deployed(partial(forward, self.deployed[0], self.info.preprocess))


def _content(image):
    """(encoded bytes, a Pillow image or a uint8 array, what errors call it) of what `Model.preprocess` takes."""
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
    name: str | Path,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    conv5: bool | None = None,
    seed: int = 0,
    **settings: Any,
) -> Model:
    """A model by its published name, or from a checkpoint of your own.

    Args:
      name: a name of `list_models`, a model directory, a training workdir, one of its numbered checkpoints or a
        .pth file.
      pretrained: load the published weights (downloaded on first use); a name alone gives fresh ones. A checkpoint of
        your own always brings its weights.
      num_classes: of a new classifier, where it is not the checkpoint's; 0: none.
      in_chans: channels of the images. For 1, grey, the first convolution takes the sum of its weights over the
        colours; for others it repeats them and scales them down (see `loading.adapt_channels`). Image files have
        colours or grey: give a model of other channels arrays.
      conv5: False ends the network after stage4, where no classifier fits: set `num_classes` to 0.
      seed: of what is made anew.
      settings: fields of ShuffleNetV2 to change, like `dtype`, `lowering` or `dropout`; of fresh models also `channels`
        and `repeats`.
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
    """The ModelInfo of published weights, before anything is downloaded."""
    published = find(name)
    rules = dialects.DIALECTS[published.source.lower()]
    return ModelInfo(
        width=published.width,
        layout=published.layout,
        num_classes=1000,
        preprocess=rules.preprocess_of(TABLES[published.width]),
        classes=tuple(imagenet_classes()),
    )


def _adapted(module, variables, info, num_classes, in_chans, conv5, seed):
    """The Model with another classifier or first convolution, or without conv5."""
    if conv5 and not info.conv5:
        raise InputError("the network ends with stage4, and no weights of conv5 are there; leave conv5 out")
    if num_classes and not conv5:
        raise InputError("the network ends with stage4, where no classifier fits; set num_classes to 0")
    variables, preprocess = adapt_channels(variables, info.preprocess, in_chans)
    params, batch_stats = dict(variables["params"]), dict(variables["batch_stats"])
    changes = {"num_classes": num_classes, "in_chans": in_chans, "conv5": conv5}
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


def inference_model(model: Model | str | Path, image: Any) -> dict[str, Any]:
    """What a model sees in one image.

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
