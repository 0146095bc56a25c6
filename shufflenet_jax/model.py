"""ShuffleNetV2 (Ma et al., ECCV 2018) in Flax Linen, in both wirings that have published weights.

Channel counts, initial weights and batch-norm constants are those of MMPretrain, torchvision and Megvii.
"""

from functools import cache, partial
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from . import lowerings
from .architecture import LAYERS, LAYOUTS, LEVELS, STAGES, Table, fault_of, name_of, resolve_table
from .batch_groups import BatchGroups
from .config import RENAMED, Initialization, require_whole_number
from .errors import InputError
from .initialization import Draw, can_draw_together, draw_of, draw_together
from .lowerings import Maps
from .shapes import Array, Features, Images, Logits, Variables

EPSILON = 1e-5
MOMENTUM = 0.9  # The share of the old running average; PyTorch's 0.1 is the share of the new value.


class Conv(nn.Module):
    """A square convolution without bias. Its `kernel` is (size, size, I / groups, O).

    Attributes:
      features: output channels O.
      size: of the kernel, 1 or 3.
      stride: in both directions.
      groups: 1, or I for a depthwise convolution.
      dtype: type of the computation.
      lowering: how the operation runs, as in ShuffleNetV2.
      initial: whose initial weights.
    """

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    dtype: DTypeLike = jnp.float32
    lowering: str = "auto"
    initial: Initialization = "mmpretrain"

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Convolve an array in the lowering's axis order."""
        lower = lowerings.resolve(self.lowering)
        fan = x.shape[lower.CHANNEL_AXIS] // self.groups
        shape = (self.size, self.size, fan, self.features)
        kernel = self.param("kernel", draw_of((*self.path, "kernel"), shape, self.initial), shape, _stored(self.dtype))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return lower.conv(x, kernel, stride=self.stride, groups=self.groups)


class BatchNorm(nn.Module):
    """Batch norm that keeps PyTorch's running variance: the unbiased one, n / (n - 1) times that of the batch.

    Attributes:
      train: whether to use, and average, the statistics of the batch.
      relu: whether a ReLU follows.
      lowering: how the operation runs, as in ShuffleNetV2.
    """

    train: bool
    relu: bool = False
    lowering: str = "reference"

    @nn.compact
    def __call__(self, x: Maps, batch_groups: BatchGroups) -> Maps:
        """Normalize an array in the lowering's axis order; in training, update the running statistics."""
        lower = lowerings.resolve(self.lowering)
        channels, dtype = (x.shape[lower.CHANNEL_AXIS],), _stored(x.dtype)
        scale = self.param("scale", nn.initializers.ones, channels, dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, dtype)
        common: dict[str, Any] = {"epsilon": EPSILON, "relu": self.relu}
        if not self.train:
            return lower.normalize(x, running_mean.value, running_var.value, scale, bias, **common)

        if batch_groups.spans is None and x.size // channels[0] < 2:
            raise InputError("batch norm needs more than one value per channel to train: enlarge the batch")
        x, mean, var = lower.batch_norm(x, scale, bias, batch_groups, **common)
        if not self.is_initializing():
            running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
            running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var
        return x


class ConvBN(nn.Module):
    """Convolution, batch norm and, by default, ReLU. The fields are those of Conv and BatchNorm."""

    features: int
    size: int
    train: bool
    relu: bool = True
    stride: int = 1
    groups: int = 1
    dtype: DTypeLike = jnp.float32
    lowering: str = "auto"
    initial: Initialization = "mmpretrain"

    @nn.compact
    def __call__(self, x: Maps, batch_groups: BatchGroups) -> Maps:
        """Apply the layers to an array in the lowering's axis order."""
        conv = Conv(
            self.features,
            self.size,
            self.stride,
            self.groups,
            self.dtype,
            self.lowering,
            self.initial,
            name="conv",
        )
        return BatchNorm(self.train, self.relu, self.lowering, name="bn")(conv(x), batch_groups)


class Unit(nn.Module):
    """One unit of a stage; the first of a stage (stride 2) also halves the resolution and widens.

    Layout "torchvision" splits the channels into halves and shuffles the joined result. Layout "megvii" splits them
    into even and odd ones instead and never shuffles; in its stride-2 units the left branch keeps the input's width.

    Attributes:
      features: output channels.
      stride: 1 or 2.
      layout: wiring, as in ShuffleNetV2.
      train: whether batch norm uses the statistics of the batch.
      dtype: type of the computation.
      lowering: how the operations run, as in ShuffleNetV2.
      initial: whose initial weights.
    """

    features: int
    stride: int
    layout: str
    train: bool
    dtype: DTypeLike = jnp.float32
    lowering: str = "auto"
    initial: Initialization = "mmpretrain"

    @nn.compact
    def __call__(self, x: Maps, batch_groups: BatchGroups) -> Maps:
        """Apply the unit to an array in the lowering's axis order."""
        names = ("train", "dtype", "lowering", "initial")
        layer = partial(ConvBN, **{name: getattr(self, name) for name in names})
        lower = lowerings.resolve(self.lowering)
        inputs = x.shape[lower.CHANNEL_AXIS]
        middle = self.features // 2
        if self.stride == 2:
            left_features = inputs if self.layout == "megvii" else middle
            left = right = x
            left = layer(inputs, 3, stride=2, groups=inputs, relu=False, name="left_dw")(left, batch_groups)
            left = layer(left_features, 1, name="left_pw")(left, batch_groups)
        else:
            left, right = lower.split(x, even_odd=self.layout == "megvii")

        right = layer(middle, 1, name="right_pw1")(right, batch_groups)
        right = layer(middle, 3, stride=self.stride, groups=middle, relu=False, name="right_dw")(right, batch_groups)
        right = layer(self.features - left.shape[lower.CHANNEL_AXIS], 1, name="right_pw2")(right, batch_groups)
        return lower.join(left, right, shuffled=self.layout != "megvii")


class Dropout(nn.Module):
    """Dropout whose mask depends on each example's place in the whole batch, not on its device.

    Attributes:
      rate: share of the values that become 0.
      train: whether to drop any.
    """

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x: Array, batch_groups: BatchGroups) -> Array:
        """Drop values of (B, ...) in training."""
        if not (self.rate and self.train):
            return x
        places = jnp.arange(len(x)) if batch_groups.places is None else batch_groups.places
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), places)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)


class ShuffleNetV2(nn.Module):
    """The whole network: `logits, features = module.apply(variables, images)`.

    Images are (B, H, W, in_chans) floats of any resolution, normalized as the weights expect. Logits are
    (B, num_classes), at least float32. Features are a dict of every stage's output, at 1/4, 1/8, 1/16 and 1/32 of the
    input's resolution, and `pooled` (B, conv5's channels); layers that the module lacks have no entry. The argument
    `batch_groups` says which images share batch statistics in training; by default all do.

    Attributes:
      width: a key of architecture.TABLES: the column of the paper's table 5.
      num_classes: 0 leaves the classifier out: logits are None.
      in_chans: channels of the images.
      layout: "torchvision", or "megvii", the wiring of the authors' own release.
      small_stem: for images of 16 to 64 pixels: conv1 has stride 1 and no max pool follows.
      conv5: False ends the network after stage4, as some published backbones do.
      dropout: rate before the classifier; Megvii trains 2.0x with 0.2.
      dtype: type of the computation; bfloat16 keeps parameters, statistics and logits in float32.
      lowering: how the operations run, see lowerings; "reference" is the plain form, and slow.
      remat: recompute each unit in the backward pass: less memory, more time.
      frozen: layers and stages whose batch norm uses its running statistics in training too: ("conv1", "stage2").
      initial: whose initial weights; "pytorch" has those of torchvision's networks.
      channels: of stem, stage2, stage3, stage4 and conv5, instead of the width's.
      repeats: units of stage2, stage3 and stage4, instead of the width's.
      outputs: of a backbone, the features to return, of LEVELS; the network ends with the last of them.
    """

    width: float | None = 1.0
    num_classes: int = 1000
    in_chans: int = 3
    layout: str = "torchvision"
    small_stem: bool = False
    conv5: bool = True
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    lowering: str = "auto"
    remat: bool = False
    frozen: tuple[str, ...] = ()
    initial: Initialization = "mmpretrain"
    channels: tuple[int, ...] | None = None
    repeats: tuple[int, ...] | None = None
    outputs: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, numbers in self.table._asdict().items():
            if getattr(self, name) is not None:  # Lists, as torchvision's constructor takes them, have no hash.
                object.__setattr__(self, name, numbers)
        for name in ("frozen", "outputs"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        _require_possible(self)

    @property
    def table(self) -> Table:
        """The network's channels and units."""
        return resolve_table(self.width, self.channels, self.repeats)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that the network has: all, unless the last of `outputs` comes before."""
        last = max(map(LEVELS.index, self.outputs or LEVELS))
        return STAGES[: max(0, last + 1 - LEVELS.index(STAGES[0]))]

    @nn.compact
    def __call__(
        self, images: Array, *, train: bool = False, batch_groups: BatchGroups | None = None
    ) -> tuple[Logits | None, Features]:
        """Return (logits, features) of images.

        Args:
          images: (B, H, W, in_chans) floats of any resolution.
          train: whether batch norm uses and averages the statistics of the batch, and dropout drops.
          batch_groups: which images share batch statistics in training; None means all.

        Raises:
          ValueError: the images have another shape.
        """
        table = self.table
        if images.ndim != 4 or images.shape[-1] != self.in_chans:
            raise ValueError(f"images have shape {images.shape}, not (B, H, W, {self.in_chans})")

        stem_channels, *stage_channels, conv5_channels = table.channels
        names = ("dtype", "lowering", "initial")
        common = {name: getattr(self, name) for name in names}

        def training(layer: str) -> bool:
            return train and layer not in self.frozen

        unit = nn.remat(Unit) if self.remat else Unit
        lower = lowerings.resolve(self.lowering)
        features: Features = {}
        batch_groups = batch_groups or BatchGroups()

        x = lower.from_nhwc(images.astype(self.dtype))
        stem = {"train": training("conv1"), "stride": 1 if self.small_stem else 2}
        x = ConvBN(stem_channels, 3, **stem, name="conv1", **common)(x, batch_groups)
        if "conv1" in (self.outputs or ()):
            features["conv1"] = lower.to_nhwc(x)  # (B, H/2, W/2, the stem's channels)
        x = x if self.small_stem else lower.max_pool(x)
        features["stem"] = lower.to_nhwc(x)  # (B, H/4, W/4, the stem's channels)
        for stage, units, channels in zip(self.stages, table.repeats, stage_channels, strict=False):
            for index in range(units):
                stride = 2 if index == 0 else 1
                settings = {"train": training(stage), "name": f"{stage}_unit{index}", **common}
                x = unit(channels, stride, self.layout, **settings)(x, batch_groups)
            features[stage] = lower.to_nhwc(x)  # (B, H/8 ... H/32, W/8 ... W/32, channels)
        if self.outputs is not None:
            return None, {name: features[name] for name in self.outputs}
        if not self.conv5:
            return None, features

        x = ConvBN(conv5_channels, 1, train=training("conv5"), name="conv5", **common)(x, batch_groups)
        features["conv5"] = lower.to_nhwc(x)
        stored = _stored(self.dtype)
        features["pooled"] = x = lower.global_mean(x.astype(stored))  # (B, conv5's channels)
        if not self.num_classes:
            return None, features

        x = Dropout(self.dropout, train)(x, batch_groups)
        uniform, shape = self.initial == "pytorch", (x.shape[1], self.num_classes)
        # Only Megvii's classifier has no bias.
        fc = nn.Dense(
            self.num_classes,
            use_bias=self.layout != "megvii",
            kernel_init=draw_of(("fc", "kernel"), shape, self.initial),
            bias_init=draw_of(("fc", "bias"), shape, self.initial) if uniform else nn.initializers.zeros,
            dtype=stored,
            param_dtype=stored,
            name="fc",
        )
        return fc(x), features


CHOICES = {  # {setting: the values it may have}
    "layout": LAYOUTS,
    "initial": get_args(Initialization),
    **dict.fromkeys(("small_stem", "conv5", "remat"), (False, True)),
}
# `outputs` is no setting: `get_model` sets it where it drops the layers that they leave out.
SETTINGS = tuple(name for name in ShuffleNetV2.__dataclass_fields__ if name not in ("parent", "name", "outputs"))


def _require_possible(module: ShuffleNetV2) -> None:
    """Raise InputError if a setting has an impossible value."""
    names_of_lowerings = ("auto", *lowerings.MODULES, *RENAMED)  # Read here because users may add a lowering.
    for name, values in {**CHOICES, "lowering": names_of_lowerings}.items():
        value = getattr(module, name)
        if not any(value is choice or (type(value) is not bool and value == choice) for choice in values):
            raise InputError(f"{name} is {value!r}, but must be one of {', '.join(map(str, values))}")
    if fault := fault_of(module.table, module.layout):
        raise InputError(fault)
    require_whole_number("num_classes", module.num_classes, 0)
    require_whole_number("in_chans", module.in_chans, 1)
    if not isinstance(module.dropout, (int, float)) or not 0 <= module.dropout < 1:
        raise InputError(f"dropout is {module.dropout!r}, but must be in [0, 1)")
    if not isinstance(module.frozen, tuple) or any(name not in LAYERS for name in module.frozen):
        raise InputError(f"frozen is {module.frozen!r}, but must be a tuple of some of {', '.join(LAYERS)}")
    if module.outputs is not None:
        _require_outputs(module)
    if module.num_classes and not module.conv5:
        raise InputError("a classifier needs conv5; set num_classes to 0, or leave conv5 out")
    try:
        floats = jnp.issubdtype(module.dtype, jnp.floating)
    except TypeError:
        floats = False
    if not floats:
        raise InputError(f"dtype is {module.dtype!r}, but must be a type of floats like float32 or bfloat16")


def _require_outputs(module: ShuffleNetV2) -> None:
    """Raise InputError where the outputs of a backbone are none, or more is asked of it."""
    outputs = module.outputs
    if not isinstance(outputs, tuple) or not outputs or any(name not in LEVELS for name in outputs):
        raise InputError(f"outputs is {outputs!r}, but must be a tuple of some of {', '.join(LEVELS)}")
    if module.num_classes or module.conv5:
        raise InputError("a network with outputs ends with them; set num_classes to 0 and conv5 to False")


def init_variables(module: ShuffleNetV2, *, seed: int = 0, key: PRNGKeyArray | None = None) -> Variables:
    """Draw fresh variables of a ShuffleNetV2: those that `module.init` gives, as NumPy arrays.

    Args:
      module: the network.
      seed: of the random numbers.
      key: used instead of the seed's key. In a traced program, where it has no value yet, the variables are part of
        the program.

    Returns:
      {"params", "batch_stats"}.
    """
    key = jax.random.key(seed) if key is None else key
    if isinstance(key, jax.core.Tracer):
        return module.init(key, _smallest_images(module))
    if not can_draw_together(_stored(module.dtype)):
        return jax.tree.map(np.asarray, jax.jit(module.init)(key, _smallest_images(module)))
    variables: dict[tuple[str, ...], np.ndarray] = {}
    draws: dict[tuple[str, ...], tuple[Draw, tuple[int, ...]]] = {}
    leaves = flatten_dict(variable_shapes(module))
    for (kind, *path), leaf in leaves.items():
        kernel = leaves.get((kind, *path[:-1], "kernel"))
        if path[-1] == "kernel" or (kernel and module.initial == "pytorch"):
            draws[tuple(path)] = draw_of(tuple(path), kernel.shape, module.initial), leaf.shape
        else:
            variables[kind, *path] = np.full(leaf.shape, path[-1] in ("scale", "var"), leaf.dtype)
    variables |= {("params", *path): numbers for path, numbers in draw_together(key, draws).items()}
    return unflatten_dict(variables)


def _smallest_images(module: ShuffleNetV2) -> Images:
    return jnp.zeros((1, 32, 32, module.in_chans), module.dtype)


def describe(module: ShuffleNetV2) -> str:
    """Describe a ShuffleNetV2 in a few words: its table, wiring and classes."""
    stem = ", small stem" if module.small_stem else ""
    head = f"{module.num_classes} classes" if module.num_classes else "no classifier: features only"
    return f"{name_of(module.table, conv5=module.conv5)}, {module.layout} layout{stem}, {head}"


def variable_shapes(module: ShuffleNetV2) -> Variables:
    """Return the shapes and types of a ShuffleNetV2's variables, as a tree of ShapeDtypeStruct; compute nothing."""
    # The reference lowering is the fastest to trace, and all have the same variables.
    return _variable_shapes(module.clone(lowering="reference", remat=False), jax.config.jax_enable_x64)


@cache
def _variable_shapes(module: ShuffleNetV2, _x64: bool) -> Variables:
    return jax.eval_shape(module.init, jax.random.key(0), _smallest_images(module))


def _stored(dtype: DTypeLike) -> np.dtype:
    """Return the type of parameters, statistics and logits for a compute type: float32, or float64 with float64."""
    return jnp.promote_types(dtype, jnp.float32)
