"""Settings as frozen dataclasses: how to prepare images, what a model is, how to train it.

The published preprocessing follows the evaluation code of MMPretrain, torchvision and Megvii.
"""

import dataclasses
import json
import math
import numbers
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from .architecture import LAYERS, STAGES, Layout, Table, fault_of, resolve_table, table_settings
from .errors import InputError, Unchecked

TypeForm = Any  # A type as an annotation has it, like int, `str | None` or a Literal, for which Python has no type yet.


def _require_types(what: str, settings: Union["Preprocess", "ModelInfo", "TrainConfig"]) -> None:
    """Raise InputError if a value does not have the type that its dataclass gives it."""
    for name, kind in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _has_type(value, kind):
            raise InputError(f"{what} has {name} = {value!r}, but it must be {_describe_type(kind)}")


def _describe_type(kind: TypeForm) -> str:
    """Describe a type in words: "int", "str or None", "one of exact, fast"."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(kind) is tuple:
        return f"a tuple of {_describe_type(arguments[0])}"
    return " or ".join(map(_describe_type, arguments)) or ("None" if kind is type(None) else kind.__name__)


def require_whole_number(name: str, value: Unchecked, least: int) -> None:
    """Raise InputError unless a value is a whole number, of Python or NumPy, and at least `least`.

    Args:
      name: of the setting, for the message.
      value: its value.
      least: smallest allowed number.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}, but must be {least} or more, a whole number")


def _has_type(value: object, kind: TypeForm) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_has_type(item, arguments[0]) for item in value)
    if arguments:
        return any(_has_type(value, argument) for argument in arguments)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


@dataclass(frozen=True)
class Preprocess:
    """The way from an encoded image to the network's input. Up to the crop it is uint8; the rest runs on the device.

    Attributes:
      decoder: "cv2" rotates the image as its EXIF orientation says; "pillow" leaves it as it is stored.
      resize: length of the short side after resizing, in pixels. If `crop` is no square, the image is scaled to just
        cover a rectangle of the crop's shape whose short side has this length.
      backend: "pillow" antialiases and rounds the long side down; "cv2" samples and rounds to nearest.
      crop: the central part that remains, in pixels: the side of a square, or height and width of a rectangle.
      channel_order: of the network's input; "L" is grey, "any" other channels than an image file has.
      scale: multiplies the uint8 values, before mean and std.
      mean: subtracted after scaling: one value per channel in channel_order.
      std: divides what is left, in the same order.
      interpolation: how to resize.
    """

    decoder: Literal["cv2", "pillow"]
    resize: int
    backend: Literal["pillow", "cv2"]
    crop: int | tuple[int, ...]
    channel_order: Literal["RGB", "BGR", "L", "any"]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bilinear"] = "bilinear"

    def __post_init__(self) -> None:
        _require_types("preprocess", self)
        channels = {"L": 1, "any": max(1, len(self.mean))}.get(self.channel_order, 3)
        object.__setattr__(self, "crop", _square_or_sides("preprocess.crop", self.crop))
        if not 0 < min(self.size) <= self.resize:
            raise InputError(f"preprocess.crop is {self.crop}, but must lie between 1 and preprocess.resize")
        if max(self.resize, *self.size) > MOST_SIDE:
            raise InputError(f"preprocess.resize is {self.resize}, but must be at most {MOST_SIDE}")
        if len(self.mean) != channels or len(self.std) != channels or not all(self.std):
            raise InputError(f"preprocess.mean and std must hold {channels} values each, std none of them 0")
        if not all(abs(value) < 3e38 for value in (self.scale, *self.mean, *self.std)):
            raise InputError("preprocess.scale, mean and std must be numbers that float32 holds")

    @property
    def channels(self) -> int:
        """Number of channels of the input."""
        return len(self.mean)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crop, in pixels."""
        return sides_of(self.crop)

    def with_side(self, side: int | tuple[int, ...], resize: int = 0) -> "Preprocess":
        """Return the same preprocessing for another crop.

        Args:
          side: of a square, or height and width of a rectangle, in pixels.
          resize: short side of the image before the crop, in pixels; 0 means 8/7 of `side`, or just `side` below 128.
        """
        short = min(sides_of(side))
        usual = round(short * 256 / 224) if short >= 128 else short  # Crops would cut too much from small images.
        return dataclasses.replace(self, resize=resize or usual, crop=side)

    def with_channels(self, channels: int) -> "Preprocess":
        """Return the same preprocessing for a network of another number of channels.

        Grey takes the mean of the means and of the deviations; other numbers repeat them in the order of RGB.

        Args:
          channels: of the network's input.
        """
        if channels == self.channels:
            return self
        in_rgb = slice(None, None, -1 if self.channel_order == "BGR" else 1)

        def adapt(numbers: tuple[float, ...]) -> tuple[float, ...]:
            if channels == 1:
                return (sum(numbers) / len(numbers),)
            return tuple(numbers[in_rgb][i % len(numbers)] for i in range(channels))

        order: Literal["RGB", "L", "any"] = "L" if channels == 1 else "RGB" if channels == 3 else "any"
        return dataclasses.replace(self, channel_order=order, mean=adapt(self.mean), std=adapt(self.std))


def _square_or_sides(name: str, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """Return the side of a square, or height and width of a rectangle. Raise InputError if there are more numbers."""
    value = tuple(value) if isinstance(value, list) else value
    if not isinstance(value, tuple):
        return value
    if len(value) != 2:
        raise InputError(f"{name} is {value}, but must be the side of a square, or height and width")
    return value[0] if value[0] == value[1] else value


def sides_of(side: int | tuple[int, ...]) -> tuple[int, int]:
    """Return height and width of a square by its side, or of a rectangle.

    Args:
      side: of a square, or height and width.
    """
    return (side[0], side[1]) if isinstance(side, tuple) else (side, side)


def square_or_rectangle(text: str) -> int | tuple[int, ...]:
    """Parse "224" as 224, and "192x256" as (192, 256), height and width.

    Args:
      text: what the user typed.

    Raises:
      ValueError: the text has another form.
    """
    sides = tuple(map(int, text.lower().split("x")))
    if len(sides) > 2:
        raise ValueError(f"{text!r} has more than two sides")
    return sides if len(sides) == 2 else sides[0]


def whole_numbers(text: str) -> tuple[int, ...]:
    """Parse "4,8,4" as (4, 8, 4).

    Args:
      text: what the user typed.

    Raises:
      ValueError: the text has another form.
    """
    return tuple(map(int, text.split(",")))


# How a command line parses a setting that has several numbers.
NUMBERS = {"custom_args": {"type": whole_numbers, "nargs": None, "metavar": "N,N,..."}}
SIDES = {"custom_args": {"type": square_or_rectangle, "nargs": None, "metavar": "SIDE|HxW"}}
SIDES_OF_IMAGES = ("image_size", "eval_size")  # Settings.
VAL_SHARE = 0.2  # Of each class, if a folder of images has no splits.
MOST_SIDE = 10_000  # Pixels; far beyond any use.
BALANCED = "balanced"  # All classes have the same weight, however many images each has.
MOST_MAGNITUDE = 30  # Of RandAugment's operations, which have 31 strengths.
MOST_STEPS = 2**31 - 1  # The step is an int32.
MOST = 1_000_000  # Classes: far beyond any use, and an axis that JAX can still handle.
# How the network's operations run: "reference" is the plain form, and slow; "auto" is the fastest one for the backend.
LoweringName = Literal["auto", "cpu", "gpu", "reference"]
LOWERINGS = typing.get_args(LoweringName)
RENAMED = {"planar": "cpu", "plain": "reference"}  # Lowerings under their earlier names.
Initialization = Literal["mmpretrain", "pytorch"]  # MMPretrain's and the authors' initial weights, or PyTorch's own.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MMPRETRAIN_EVAL = Preprocess(
    "cv2", 256, "pillow", 224, "RGB", 1.0, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)
TORCHVISION_EVAL = Preprocess("pillow", 256, "pillow", 224, "RGB", 1 / 255, IMAGENET_MEAN, IMAGENET_STD)
TORCHVISION_EVAL_LARGE = dataclasses.replace(TORCHVISION_EVAL, resize=232)  # The weights of 1.5x and 2.0x.
MEGVII_EVAL = Preprocess("pillow", 256, "cv2", 224, "BGR", 1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
CIFAR10_EVAL = Preprocess(
    "cv2", 32, "pillow", 32, "RGB", 1 / 255, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)
DIGITS_EVAL = Preprocess("pillow", 32, "pillow", 32, "L", 1 / 255, mean=(0.305,), std=(0.376,))
PREPROCESSING = {
    "mmpretrain": MMPRETRAIN_EVAL,
    "torchvision": TORCHVISION_EVAL,
    "megvii": MEGVII_EVAL,
    "cifar10": CIFAR10_EVAL,
    "digits": DIGITS_EVAL,
}


def _keep_table(settings: Union["ModelInfo", "TrainConfig"]) -> None:
    """Check the table of settings, and reduce a published one to its width.

    Raises:
      InputError: no network of its layout can have the table.
    """
    table = resolve_table(settings.width, settings.channels, settings.repeats)
    if fault := fault_of(table, settings.layout):
        raise InputError(fault)
    for name, value in table_settings(table).items():
        object.__setattr__(settings, name, value)


@dataclass(frozen=True)
class ModelInfo:
    """The contents of model.json: how to build the network and how to prepare its images.

    Attributes:
      width: a key of architecture.TABLES; None if no published table has the network's channels and repeats.
      layout: wiring of the network.
      num_classes: 0 means no classifier.
      preprocess: how to prepare images.
      classes: name of each label; WNIDs for ImageNet.
      in_chans: channels of the images.
      small_stem: whether conv1 has stride 1 and no max pool follows.
      conv5: whether the network has conv5.
      dropout: rate before the classifier.
      source: file name, sha256 and dialect, or the training configuration.
      metrics: of the last evaluation.
      sha256: of the variables in the same directory.
      channels: of stem, stage2, stage3, stage4 and conv5; None means those of the width.
      repeats: units of stage2, stage3 and stage4; None means those of the width.
    """

    width: float | None
    layout: Layout
    num_classes: int
    preprocess: Preprocess
    classes: tuple[str, ...] | None = None
    in_chans: int = 3
    small_stem: bool = False
    conv5: bool = True
    dropout: float = 0.0
    source: dict = field(default_factory=dict)
    metrics: dict | None = None
    sha256: str | None = None
    channels: tuple[int, ...] | None = None
    repeats: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require_types("model.json", self)
        possible = 0 <= self.num_classes <= MOST and 0 <= self.dropout < 1
        if not possible or (self.num_classes and not self.conv5):
            raise InputError("model.json describes no network of this family")
        try:
            _keep_table(self)
        except InputError as error:
            raise InputError(f"model.json describes no network of this family: {error}") from error
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise InputError(f"model.json names {len(self.classes)} classes, but num_classes is {self.num_classes}")
        if self.preprocess.channels != self.in_chans:
            raise InputError(
                f"model.json prepares {self.preprocess.channels} channels, but in_chans is {self.in_chans}"
            )

    @property
    def table(self) -> Table:
        """The network's channels and units."""
        return resolve_table(self.width, self.channels, self.repeats)

    def to_json(self) -> str:
        """Return the text of a model.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelInfo":
        """Parse the text of a model.json.

        Args:
          text: from `to_json`.

        Raises:
          InputError: the text is damaged or describes no possible network.
        """
        try:
            values = json.loads(text)
            values["preprocess"] = Preprocess(**_tuples(values["preprocess"]))
            return cls(**_tuples(values))
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"model.json is not a model description: {error!r}") from error


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    With `rule`, a value of 0 leaves image_size, batch_size, epochs (without steps) and learning_rate open, and a width
    of None without channels and repeats leaves the network open. `training.rule` chooses them.

    The comment above each field is also the help text of its option.
    """

    # Data: "tfds:NAME"; a folder of images, or a zip or tar of one: <split>/<class>/<image>, <class>/<image>, or with
    # lists meta/<split>.txt; or "digits".
    data: str
    # Folder of TFDS data sets; by default TFDS's own.
    data_dir: str | None = None
    # Split to train on.
    train_split: str = "train"
    # Split to evaluate on; by default the first of val, validation and test that the data has.
    eval_split: str | None = None
    # Share of each class that is held out as split val where a folder has no splits; a hash of the names decides.
    val_share: float = VAL_SHARE
    # Width of the network: 0.5, 1.0, 1.5 or 2.0 times the channels of the stages. None without channels: the network
    # and the normalization of its images are those of init_from.
    width: float | None = 1.0
    # Channels of the stem, stage2, stage3, stage4 and conv5, like 24,48,96,192,192, instead of a width.
    channels: tuple[int, ...] | None = field(default=None, metadata=NUMBERS)
    # Units of stage2, stage3 and stage4, instead of 4,8,4.
    repeats: tuple[int, ...] | None = field(default=None, metadata=NUMBERS)
    # Wiring of the network; "megvii" is the authors' own.
    layout: Layout = "torchvision"
    # First convolution with stride 1 and no max pool after it, for images of 16 to 64 pixels.
    small_stem: bool = False
    # Checkpoint, of any form (hf-hub:OWNER/NAME too), to begin with; a classifier for other classes is reinitialized.
    init_from: str | None = None
    # Layers to freeze, with batch norm in inference mode, like "conv1,stage2"; "backbone": all but the classifier.
    freeze: str = ""
    # Train only the classifier, in seconds, on features that are computed once: logistic regression on training images
    # as evaluation prepares them. Of the settings of loss and order, it uses class_weights and sampling.
    linear_probe: bool = False
    # Begin with the classifier of a linear probe, so that its first steps do not distort the features (Kumar et al.,
    # ICLR 2022).
    probe_first: bool = False
    # Whose initial weights: MMPretrain's and the authors', or PyTorch's own, which torchvision's networks use.
    initial: Initialization = "mmpretrain"
    # Whose way to decode, scale and normalize images; "digits" makes them grey.
    preprocessing: Literal["mmpretrain", "torchvision", "megvii", "cifar10", "digits"] = "mmpretrain"
    # Channels of the images: 1 makes them grey, 3 colored; 0: those of `preprocessing`.
    in_chans: int = 0
    # Side of the square input in training, in pixels, or height x width of a rectangle, like 192x256.
    image_size: int | tuple[int, ...] = field(default=224, metadata=SIDES)
    # The same in evaluation; 0: image_size.
    eval_size: int | tuple[int, ...] = field(default=0, metadata=SIDES)
    # Short side of an image before evaluation crops it, in pixels; 0: 8/7 of eval_size, or just eval_size below 128.
    eval_resize: int = 0
    # Dropout rate before the classifier; Megvii trained 2.0x with 0.2.
    dropout: float = 0.0
    # Part of a training image to use: "random" draws size, shape and place, "center" takes what evaluation uses.
    crop: Literal["random", "center"] = "random"
    # How to make a random crop: "exact" equals MMPretrain's to the pixel (Pillow, antialiased); "fast" uses
    # libjpeg-turbo's fast methods and OpenCV's scaling without antialiasing, which interpolates JPEGs differently.
    transform: Literal["exact", "fast"] = "exact"
    # Smallest area of a random crop, as a share of the image's.
    min_area: float = 0.08
    # Mirror every second training image, at random.
    flip: bool = True
    # Largest random shift of a training image, in pixels; uncovered pixels become 0.
    shift: int = 0
    # Strength of random brightness, contrast and saturation: 0.4 draws factors from 0.6 to 1.4.
    color_jitter: float = 0.0
    # One random operation at a random strength on each training image (TrivialAugmentWide).
    trivial_augment: bool = False
    # Random operations on each training image, one after another (RandAugment); 0: none.
    rand_augment: int = 0
    # Strength of RandAugment's operations, from 0 to 30.
    rand_magnitude: int = 9
    # Share of training images in which a random rectangle is erased.
    random_erasing: float = 0.0
    # How to choose image_size, batch_size, epochs and learning_rate if they are 0: "images" uses the number and the
    # size of the training images.
    rule: Literal["none", "images"] = "none"
    # Images of an epoch: "all" takes each once; "balanced" takes as many of each class, some of them repeatedly.
    sampling: Literal["all", "balanced"] = "all"
    # How often to use each image of an epoch in a row, each time with other random numbers (repeated augmentation).
    aug_repeats: int = 1
    # Processes that decode training images, on each host; 0 decodes in threads of the main process.
    workers: int = 0
    # Share of the training images that may be damaged; other images replace them, and more than this stops the run.
    max_damaged: float = 0.001
    # Passes over the training data.
    epochs: int = 300
    # Steps in all, instead of epochs; 0: as many as the epochs have.
    steps: int = 0
    # Further steps at the end, which only recompute batch norm's running statistics, as their mean over these steps.
    recalibrate: int = 0
    # Images per step, over all devices and hosts.
    batch_size: int = 1024
    # Images that share batch statistics, whatever the number of devices: the batch of one GPU in a published run. 0:
    # all images of a batch, which is synchronized batch norm.
    bn_group_size: int = 64
    # Number of parts in which the devices process a batch, one after another; 0: as few as fit in the memory for 64
    # images of 224 pixels a side on a CPU, or 256 on an accelerator.
    accumulate: int = 0
    # Images per evaluation step, over all devices and hosts.
    eval_batch_size: int = 1024
    # Learning rate at the top of the schedule.
    learning_rate: float = 0.5
    # Batch size that learning_rate is meant for; another batch size scales it in proportion. 0 never scales.
    scale_lr_from: int = 0
    # How the learning rate falls to 0 over the run: "linear", "cosine" (half a wave), or not at all.
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    # How often the learning rate changes.
    lr_every: Literal["step", "epoch"] = "step"
    # Length of the warm-up in steps.
    warmup_steps: int = 0
    # Length of the warm-up in epochs, which are added to its steps.
    warmup_epochs: int = 0
    # Share of the schedule's learning rate at which the warm-up begins.
    warmup_factor: float = 0.1
    # How that share grows during the warm-up: not at all, or linearly to 1.
    warmup: Literal["constant", "linear"] = "constant"
    # Let the schedule begin when the warm-up ends, instead of both together.
    warmup_first: bool = False
    # How gradients update the weights: "sgd" with momentum, or "adamw", both as PyTorch computes them.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    # Learning rate of all layers but the classifier, as a share of the learning rate.
    backbone_lr: float = 1.0
    # Momentum of SGD, and AdamW's first beta.
    momentum: float = 0.9
    # Nesterov's form of SGD's momentum.
    nesterov: bool = False
    # AdamW's second beta: the share of the old mean square of the gradient at each step.
    beta2: float = 0.999
    # Factor on the weights: SGD's coupled L2 penalty, or AdamW's decoupled decay.
    weight_decay: float = 4e-5
    # Which weights decay: all, "no_norm" (all but scale and bias of batch norm) or "matrices" (with two axes or more).
    decay: Literal["no_norm", "matrices", "all"] = "no_norm"
    # Share of the target that is spread evenly over all classes.
    label_smoothing: float = 0.0
    # File with a number for each class, one per line, which multiplies the losses of its images. Their mean divides by
    # the number of images, as in MMPretrain, not by the sum of the weights, as PyTorch's own mean does. "balanced"
    # computes them from the counts: all images / (classes * images of the class), 1 on average over the images.
    class_weights: str | None = None
    # Mix each image with the next one of its batch-norm group, in shares from Beta(mixup, mixup); 0 never does.
    mixup: float = 0.0
    # Paste a rectangle of the next image over each, its area from Beta(cutmix, cutmix); with mixup, one of both at
    # random; 0 never does.
    cutmix: float = 0.0
    # Largest norm of the gradient over all parameters; 0 never clips.
    clip_norm: float = 0.0
    # Keep an exponential moving average of parameters and statistics: the share of the old one at each update; 0: none.
    ema_decay: float = 0.0
    # Steps between two updates of that average, counted from the start of each epoch. Updates during the warm-up, and
    # the first one after it, copy.
    ema_every: int = 1
    # Checkpoint, of any form, whose predictions the network learns beside the labels, or an .npz file of `eval.py
    # --predictions` with these predictions for the training images.
    teacher: str | None = None
    # Share of the teacher in the loss.
    teacher_weight: float = 0.5
    # Divides both networks' logits before they are compared.
    temperature: float = 4.0
    # Type of the computation; parameters, statistics and logits stay float32 (float64 with float64).
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    # How the network's operations run; "reference" is the plain form, and slow.
    lowering: LoweringName = "auto"
    # Recompute each unit in the backward pass: less memory, more time.
    remat: bool = False
    # Seed of initialization, order and augmentation.
    seed: int = 0
    # Epochs between evaluations; each is followed by a checkpoint, and so is the last step.
    eval_every: int = 1
    # Evaluations without a higher top-1 after which the run ends early; 0: it never does.
    patience: int = 0
    # Steps between two lines of the training log.
    log_every: int = 100
    # Newest checkpoints to keep; the best is always kept too.
    keep: int = 2

    def __post_init__(self) -> None:
        self._unify()
        _require_types("TrainConfig", self)
        self._check_sides()
        counts = (
            *(("epochs", "batch_size") if self.rule == "none" else ()),
            "eval_batch_size",
            "aug_repeats",
            "eval_every",
            "log_every",
            "keep",
            "ema_every",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least 1")
        lengths = (
            "epochs",
            "batch_size",
            "steps",
            "recalibrate",
            "warmup_steps",
            "warmup_epochs",
            "bn_group_size",
            "accumulate",
            "scale_lr_from",
            "rand_augment",
            "patience",
        )
        strengths = ("learning_rate", "backbone_lr", "weight_decay", "clip_norm", "mixup", "cutmix", "warmup_factor")
        for name in (*lengths, *strengths, "eval_resize", "shift", "workers", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}, but must be 0 or more")
        for name in (*counts, *lengths):
            if getattr(self, name) > MOST_STEPS:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at most {MOST_STEPS}")
        for name in ("color_jitter", "random_erasing", "max_damaged", "min_area", "teacher_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be in [0, 1]")
        if not 0 < self.val_share < 1:
            raise InputError(f"val_share is {self.val_share}, but must lie between 0 and 1")
        for name in ("momentum", "beta2", "dropout", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be in [0, 1)")
        if self.in_chans not in (0, 1, 3):
            raise InputError(
                f"in_chans is {self.in_chans}, but images have 1 (grey) or 3 channels; 0: as preprocessing"
            )
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}, but must be more than 0")
        if self.image_size and min(self.preprocess.size) > self.preprocess.resize:
            raise InputError(f"eval_resize is {self.eval_resize}, but must be at least what evaluation cuts")
        unknown = set(self.freeze.split(",")) - {*LAYERS, "backbone", ""}
        if unknown:
            raise InputError(f"freeze names {', '.join(unknown)}, but there are backbone and {', '.join(LAYERS)}")
        if not 0 <= self.rand_magnitude <= MOST_MAGNITUDE:
            raise InputError(f"rand_magnitude is {self.rand_magnitude}, but must lie between 0 and {MOST_MAGNITUDE}")
        if self.nesterov and (self.optimizer == "adamw" or not self.momentum):
            why = "the optimizer is adamw" if self.optimizer == "adamw" else "momentum is 0"
            raise InputError(f"nesterov is a form of SGD's momentum, but {why}")
        if self.patience and self.recalibrate:
            raise InputError(
                "patience ends a run before the steps that recalibrate its running statistics; set one of both to 0"
            )
        if (self.linear_probe or self.probe_first) and not self.init_from:
            raise InputError(
                "linear_probe and probe_first need the features of a trained network; name one with `init_from`"
            )

    def _unify(self) -> None:
        """Bring renamed values, sides and the network's table into their current form."""
        if isinstance(self.lowering, str):
            object.__setattr__(self, "lowering", RENAMED.get(self.lowering, self.lowering))
        if isinstance(self.repeats, int) or (isinstance(self.repeats, (tuple, list)) and len(self.repeats) == 1):
            raise InputError(
                f"repeats is {self.repeats}, but must be the units of {', '.join(STAGES)}, like 4,8,4; `aug_repeats` "
                "says how often a pass uses each image"
            )
        for name in SIDES_OF_IMAGES:
            object.__setattr__(self, name, _square_or_sides(name, getattr(self, name)))
        if not self.takes_network:
            _keep_table(self)
        elif not self.init_from:
            raise InputError("width is None, which stands for the network of a checkpoint; name one with `init_from`")

    def _check_sides(self) -> None:
        """Raise InputError if a side is impossible."""
        for name in SIDES_OF_IMAGES:
            least = 1 if isinstance(getattr(self, name), tuple) or (name, self.rule) == ("image_size", "none") else 0
            if min(sides_of(getattr(self, name))) < least:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least {least}")

    @property
    def takes_network(self) -> bool:
        """Whether the checkpoint of `init_from` decides about the network, which is not described here yet."""
        return self.width is None and self.channels is None and self.repeats is None

    @property
    def table(self) -> Table:
        """The network's channels and units."""
        return resolve_table(self.width, self.channels, self.repeats)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers and stages that do not train."""
        named = self.freeze.split(",")
        return tuple(name for name in LAYERS if name in named or "backbone" in named)

    @property
    def preprocess(self) -> Preprocess:
        """How evaluation prepares an image for the network."""
        return self._preprocess(self.eval_size or self.image_size, self.eval_resize)

    @property
    def train_preprocess(self) -> Preprocess:
        """How training prepares an image, apart from augmentation."""
        return self._preprocess(self.image_size, 0)

    def _preprocess(self, side: int | tuple[int, ...], resize: int) -> Preprocess:
        preprocess = PREPROCESSING[self.preprocessing]
        return preprocess.with_channels(self.in_chans or preprocess.channels).with_side(side, resize)


# The behavior of versions that lacked a setting, if it differs from the setting's default.
BEFORE_IT_EXISTED: dict[str, Any] = {}


def current_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that an older version stored, as a TrainConfig of today would hold them.

    Settings that the older version lacked take the value of its behavior, and renamed values their new names.

    Args:
      stored: {name of a field of TrainConfig: value}.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    settings = _tuples({**defaults, **BEFORE_IT_EXISTED, **stored})
    if isinstance(settings["repeats"], int):  # The earlier name of aug_repeats.
        settings |= {"aug_repeats": settings["repeats"], "repeats": None}
    return {**settings, "lowering": RENAMED.get(str(settings["lowering"]), settings["lowering"])}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the lists that JSON has to the tuples that the dataclasses have."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
