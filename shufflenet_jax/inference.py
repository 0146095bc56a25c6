"""Models for people who want predictions: a network, its weights and the way its images are prepared, in one object."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NotRequired, SupportsIndex, TypedDict, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from .accounting import count, total
from .architecture import TABLES
from .backbone import FeatureInfo, drop_layers, feature_info_of, resolve_levels
from .checkpoint import FIXED, module_of, save_model
from .config import ModelInfo, require_whole_number
from .data import normalization
from .data.labels import class_name, imagenet_classes
from .deploy import Deployed, compile_deployed, deploy
from .errors import InputError, Unchecked
from .forward import forward
from .images import Named, are_several, listed, prepare_all
from .loading import adapt_channels, load_model
from .model import ShuffleNetV2, describe, init_variables
from .porting import dialects
from .published import PUBLISHED, find
from .shapes import Array, Features, Logits, Variables

logger = logging.getLogger(__name__)

BATCH = 16  # Images that `inference_model` and `predict` give the network at a time.
Pixels = UInt8[np.ndarray | Array, "batch height width channels"]
Ready = Pixels | Float[np.ndarray | Array, "batch height width channels"]
Ranked = TypedDict("Ranked", {"label": int, "class": str, "score": float})


class Prediction(TypedDict):
    """What a model sees in an image; the first four keys are MMPretrain's.

    Attributes:
      pred_label: the class with the highest score.
      pred_class: its name.
      pred_score: its probability.
      pred_scores: the probability of each class.
      topk: the best classes, the best first, where they were asked for.
    """

    pred_label: int
    pred_class: str
    pred_score: float
    pred_scores: Float[np.ndarray, " num_classes"]
    topk: NotRequired[list[Ranked]]


class PublishedFigures(TypedDict):
    """Published weights and what their network costs, in JSON's types.

    Attributes:
      name: how `get_model` and every command call them.
      parameters: of the network, without batch norm's running statistics.
      multiply_adds: of one image, at the resolution of the published evaluation.
      width: a key of architecture.TABLES.
      layout: how the units are wired.
      top1: percent on ImageNet's validation images, as published.
      top5: the same.
      source: the project that publishes them.
      licence: of the weights.
      file: its name.
      url: where it lies; None where no program can fetch it.
    """

    name: str
    parameters: int
    multiply_adds: int
    width: float
    layout: str
    top1: float
    top5: float
    source: str
    licence: str
    file: str
    url: str | None


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
        """Return the logits of images.

        Args:
          images: an array (B, H, W, C), as it is: uint8 in RGB or grey from `preprocess`, which is normalized, or
            floats as the network takes them, normalized already. Or what `preprocess` takes (paths, addresses, Pillow
            images, single arrays, lists of these), which is prepared first.

        Raises:
          InputError: the model has no classifier, or something is not an image.
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

    def preprocess(
        self, images: Unchecked, *, name: str | None = None
    ) -> UInt8[np.ndarray, "batch crop_height crop_width channels"]:
        """Return the evaluation transform of images, ready for the model.

        Args:
          images: a path, an http(s) address, encoded bytes, a Pillow image, a uint8 array (H, W, 3) in RGB or (H, W) in
            grey, a list of these in any mixture, or a uint8 array (B, H, W, C) of images. A Pillow image of any mode
            gives what a file with its content gives, EXIF's rotation included.
          name: what errors call the image; by default its path, address or place in the list.

        Raises:
          InputError: something is not an image, or cannot be read.
        """
        return prepare_all(listed(images), self.info.preprocess, name)

    def normalize(self, images: Pixels) -> Float[Array, "batch height width channels"]:
        """Return what the network takes of uint8 images in RGB or grey, for loops of your own."""
        return normalization.normalize(images, self.info.preprocess, self.module.dtype)

    @property
    def num_features(self) -> int:
        """Channels of `pooled`, from which a classifier predicts; of stage4 where the network ends there."""
        return self.module.table.channels[-1 if self.module.conv5 else -2]

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write a model directory, which `get_model` and every command read back: whole, or not at all.

        It holds the weights, and of the settings `dropout`: `dtype`, `lowering`, `remat` and `frozen` belong to a
        program.

        Args:
          out: the directory; it must not exist.
          overwrite: whether a model directory that lies there may be replaced.

        Raises:
          InputError: something lies there already, or the place cannot be written.
        """
        info = dataclasses.replace(self.info, dropout=float(self.module.dropout))
        save_model(out, info, self.variables, overwrite=overwrite)

    def class_name(self, label: SupportsIndex) -> str:
        """Return a class's name for people: ImageNet's by a short name, others as in their data, or the label.

        Args:
          label: of the class.
        """
        return class_name(self.info.classes, label)

    def class_activation_map(
        self, conv5: Float[Array, "height width channels"], label: SupportsIndex
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

    def ranked(self, scores: Float[np.ndarray, " num_classes"], count: int) -> list[Ranked]:
        """Return the classes with the highest scores, the highest first; of equal ones the smaller label."""
        labels = np.argsort(-scores, kind="stable")[:count]
        return [{"label": int(i), "class": self.class_name(int(i)), "score": float(scores[i])} for i in labels]

    def outputs(self, images: Unchecked) -> tuple[Logits | None, Features]:
        """Return logits and features of images, both at once; a backbone's logits are None.

        Args:
          images: as for a call.

        Raises:
          InputError: the images have another type or shape.
        """
        return self._apply(self._weights, self._ready(images))

    def _ready(self, images: Unchecked) -> jax.Array:
        """Return images as the network's program takes them: (B, H, W, C), uint8 or normalized floats."""
        if _to_prepare(images):
            given = listed(images)
            _warn_of_crops(given, self.info.preprocess.size)
            return jnp.asarray(prepare_all(given, self.info.preprocess))
        takes = f"(B, H, W, {self.info.in_chans}), uint8 or floats; give it what preprocess returns or takes"
        try:
            images = jnp.asarray(images)
        except (TypeError, ValueError) as error:
            raise InputError(f"images are not an array of numbers, but the model takes {takes}") from error
        numbers = images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating)
        if not numbers or images.ndim != 4 or images.shape[-1] != self.info.in_chans or 0 in images.shape[1:]:
            raise InputError(f"images are {images.dtype} of shape {images.shape}, but the model takes {takes}")
        return images

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


class Backbone:
    """A network that ends with feature maps, for detectors and other heads.

    Attributes:
      module: a ShuffleNetV2; `module.apply(variables, images)` returns (None, {name: map}).
      variables: its {"params", "batch_stats"}, as NumPy arrays: those of the layers that the maps need.
      info: a ModelInfo: how images are prepared.
      feature_info: name, channels and reduction of each map.
    """

    def __init__(self, module: ShuffleNetV2, variables: Variables, info: ModelInfo) -> None:
        self._model = Model(module, variables, info)
        self.module, self.variables, self.info = module, variables, info
        self.feature_info: FeatureInfo = feature_info_of(module)

    def __repr__(self) -> str:
        maps = ", ".join(f"{level.name} ({level.channels}, 1/{level.reduction})" for level in self.feature_info)
        return f"<Backbone: ShuffleNetV2 {describe(self.module)}; {maps}>"

    def __call__(self, images: Unchecked) -> list[Float[Array, "batch height width channels"]]:
        """Return the feature maps of images, which are given as to a Model: arrays (B, H, W, C) of any resolution."""
        features = self._model.extract_feat(images)
        return [features[level.name] for level in self.feature_info]

    def preprocess(self, images: Unchecked) -> UInt8[np.ndarray, "batch crop_height crop_width channels"]:
        """Return the evaluation transform of images, as `Model.preprocess` does."""
        return self._model.preprocess(images)

    def normalize(self, images: Pixels) -> Float[Array, "batch height width channels"]:
        """Return what the network takes of uint8 images in RGB or grey of any resolution, for loops of your own."""
        return self._model.normalize(images)

    @property
    def num_features(self) -> int:
        """Channels of the last map."""
        return self.feature_info[-1].channels


def _to_prepare(images: Unchecked) -> bool:
    """Return whether the model must prepare images first: all but arrays (B, H, W, C), of floats, or in a program."""
    if isinstance(images, jax.core.Tracer):
        return False
    return not hasattr(images, "ndim") or bool(images.ndim < 4 and images.dtype == np.uint8)


def _warn_of_crops(images: Sequence[Named], size: tuple[int, int]) -> None:
    """Warn of arrays that look like what `preprocess` returns, (height, width), and would be cropped again."""
    if any(tuple(getattr(image, "shape", ())[:2]) == size for image, _ in images):
        logger.warning(
            "an array of %d x %d pixels is scaled and cropped, as every image is; to use its pixels as they are, give "
            "an array (B, H, W, C)",
            *size,
        )


@overload
def get_model(
    name: str | Path, pretrained: bool = False, *, features_only: Literal[False] = False, **settings: Unchecked
) -> Model: ...
@overload
def get_model(
    name: str | Path, pretrained: bool = False, *, features_only: Literal[True], **settings: Unchecked
) -> Backbone: ...
def get_model(
    name: Unchecked,
    pretrained: bool = False,
    *,
    num_classes: Unchecked = None,
    in_chans: Unchecked = None,
    conv5: bool | None = None,
    features_only: Unchecked = False,
    out_indices: Unchecked = None,
    seed: Unchecked = 0,
    **settings: Unchecked,
) -> Model | Backbone:
    """Return a model by its published name, or from your own checkpoint.

    Args:
      name: a name of `list_models`, a model directory, a training workdir, one of its numbered checkpoints or a
        .pth file.
      pretrained: load the published weights (downloaded on first use); a name alone gives fresh ones. A checkpoint of
        your own always brings its weights.
      num_classes: of a new classifier, where it is not the checkpoint's; 0: none.
      in_chans: channels of the images. For 1, grey, the first convolution takes the sum of its weights over the
        colors; for others it repeats them and scales them down (see `loading.adapt_channels`). Image files have
        colors or grey: give a model of other channels arrays.
      conv5: False ends the network after stage4, where no classifier fits: set `num_classes` to 0.
      features_only: return a Backbone, which computes feature maps alone, without the layers behind them.
      out_indices: which feature maps, ascending: 0 conv1, 1 stem, 2 to 4 stage2 to stage4; by default all.
      seed: of new weights.
      settings: fields of ShuffleNetV2 to change, like `dtype`, `lowering` or `dropout`; for fresh models also
        `channels` and `repeats`.

    Raises:
      InputError: a ValueError whose message is one line; there is no such model, or it cannot be loaded.
    """
    require_whole_number("seed", seed, 0)
    if features_only:
        if num_classes or conv5:
            raise InputError("a backbone ends with its feature maps; leave num_classes and conv5 out")
        num_classes, conv5, outputs = 0, False, resolve_levels(out_indices)
    elif out_indices is not None:
        raise InputError("out_indices choose the feature maps of a backbone; set features_only, or leave them out")
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
    model = Model(module, variables, info)
    if (num_classes, in_chans, conv5) != (info.num_classes, info.in_chans, info.conv5):
        model = _adapted(module, variables, info, num_classes, in_chans, conv5, seed)
    return Backbone(*drop_layers(model.module, model.variables, outputs), model.info) if features_only else model


@overload
def list_models(pattern: str = "*", *, details: Literal[False] = False) -> list[str]: ...
@overload
def list_models(pattern: str = "*", *, details: Literal[True]) -> list[PublishedFigures]: ...
def list_models(pattern: str = "*", *, details: bool = False) -> list[str] | list[PublishedFigures]:
    """Return the names of the published weights.

    Args:
      pattern: which names, with wildcards as in a shell, like "*x1*".
      details: return the PublishedFigures of each instead, which takes a second for each.
    """
    names = [name for name in PUBLISHED if fnmatchcase(name, pattern)]
    return [describe_published(name) for name in names] if details else names


def describe_published(name: str) -> PublishedFigures:
    """Return what published weights are and what their network costs, before anything is downloaded."""
    published, info = find(name), published_info(name)
    costs = total(count(module_of(info), *info.preprocess.size))
    return {
        "name": name,
        "parameters": costs["parameters"],
        "multiply_adds": costs["multiply_adds"],
        "width": published.width,
        "layout": published.layout,
        "top1": published.top1,
        "top5": published.top5,
        "source": published.source,
        "licence": published.licence,
        "file": published.file,
        "url": f"{published.place}{published.file}" if published.place else None,
    }


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


@overload
def inference_model(
    model: Model | str | Path, images: str | Path | bytes | Image.Image, *, top_k: int | None = None
) -> Prediction: ...
@overload
def inference_model(
    model: Model | str | Path, images: list[Any] | tuple[Any, ...], *, top_k: int | None = None
) -> list[Prediction]: ...
@overload
def inference_model(model: Model | str | Path, images: Unchecked, *, top_k: int | None = None) -> Unchecked: ...
def inference_model(model: Unchecked, images: Unchecked, *, top_k: Unchecked = None) -> Prediction | list[Prediction]:
    """Return what a model sees in an image, or in each of a list.

    Args:
      model: a Model, a published name or a checkpoint.
      images: one or more, as `Model.preprocess` takes them.
      top_k: how many of the best classes to list as `topk`, 1 or more; None leaves the list out.


    Returns:
      The Prediction of an image, or a list of them for a list or a batch (B, H, W, C).

    Raises:
      InputError: something is not an image, cannot be read, or the model has no classifier.
    """
    if top_k is not None:
        require_whole_number("top_k", top_k, 1)
    if not isinstance(model, Model):
        model = get_model(model, pretrained=True)
    predictions = [_prediction(model, scores, top_k) for scores in _scores(model, listed(images))]
    return predictions if are_several(images) else predictions[0]


def _scores(model: Model, images: Sequence[Named]) -> Iterator[Float[np.ndarray, " num_classes"]]:
    """Yield the probabilities of each image. Batches have one size, so that one program computes them all."""
    size = 1 if len(images) == 1 else BATCH
    for first in range(0, len(images), size):
        crops = prepare_all(images[first : first + size], model.info.preprocess)
        filled = np.concatenate([crops, np.repeat(crops[:1], size - len(crops), axis=0)])
        yield from np.asarray(jax.nn.softmax(model(filled).astype(jnp.float32)))[: len(crops)]


def _prediction(model: Model, scores: Float[np.ndarray, " num_classes"], top_k: int | None) -> Prediction:
    """Return the Prediction that probabilities are."""
    (best,) = model.ranked(scores, 1)
    prediction: Prediction = {
        "pred_label": best["label"],
        "pred_class": best["class"],
        "pred_score": best["score"],
        "pred_scores": scores,
    }
    return prediction if top_k is None else {**prediction, "topk": model.ranked(scores, top_k)}
