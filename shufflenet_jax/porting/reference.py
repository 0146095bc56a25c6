"""ShuffleNetV2 in PyTorch, in both wirings and with each project's parameter names: the reference for conversions.

The modules nest as in the original projects. A published state dict therefore loads strictly, without the key tables of
dialects.py. The code follows the published descriptions, and test_porting compares it with reference logits.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol, TypedDict

import torch
from jaxtyping import Float
from torch import nn

from ..architecture import STAGES, Table
from ..model import ShuffleNetV2

Inputs = Float[torch.Tensor, "batch inputs in_height in_width"]
Outputs = Float[torch.Tensor, "batch outputs out_height out_width"]
Features = dict[str, torch.Tensor]  # {name of a feature: (B, C, H, W), or (B, C) for "pooled"}
Layer = tuple[nn.Conv2d, bool]  # A convolution that batch norm follows, and whether ReLU follows both.
Nest = Callable[[Iterable[Layer]], nn.Sequential]  # Builds the modules of several layers.
MakeUnit = Callable[[int, int, int], nn.Module]  # (input channels, output channels, stride) -> a unit.


class ConvModule(nn.Module):
    """A layer as MMPretrain names it: `conv`, `bn` and `activate`.

    Args:
      conv: the convolution.
      relu: whether ReLU follows batch norm.
    """

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels)
        self.activate = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Inputs) -> Outputs:
        """Apply the convolution, batch norm and the activation."""
        return self.activate(self.bn(self.conv(x)))


def named(layers: Iterable[Layer]) -> nn.Sequential:
    """Nest layers as MMPretrain does: one ConvModule per layer."""
    return nn.Sequential(*(ConvModule(conv, relu=relu) for conv, relu in layers))


def numbered(layers: Iterable[Layer]) -> nn.Sequential:
    """Nest layers as all other projects do: one flat sequence of convolutions, batch norms and ReLUs."""
    modules: list[nn.Module] = []
    for conv, relu in layers:
        modules += [conv, nn.BatchNorm2d(conv.out_channels)] + [nn.ReLU()] * relu
    return nn.Sequential(*modules)


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 1x1 convolution without bias.

    Args:
      inputs: number of input channels.
      outputs: number of output channels.
    """
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def depthwise(channels: int, stride: int) -> nn.Conv2d:
    """Return a depthwise 3x3 convolution without bias.

    Args:
      channels: number of input and output channels.
      stride: along both axes.
    """
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)


class TorchvisionUnit(nn.Module):
    """A unit that splits its channels into halves and shuffles its output.

    Args:
      inputs: number of input channels.
      outputs: number of output channels.
      stride: 1, or 2 for the first unit of a stage, which has a left branch.
      nest: builds the modules of a branch, `named` or `numbered`.
      left: attribute of the left branch.
      right: attribute of the right branch.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        nest: Nest = numbered,
        left: str = "branch1",
        right: str = "branch2",
    ) -> None:
        super().__init__()
        half = outputs // 2
        self.left = left if stride == 2 else None
        self.right = right
        if self.left:
            self.add_module(left, nest([(depthwise(inputs, 2), False), (pointwise(inputs, half), True)]))
        entering = inputs if self.left else half
        layers = [(pointwise(entering, half), True), (depthwise(half, stride), False), (pointwise(half, half), True)]
        self.add_module(right, nest(layers))

    def forward(self, x: Inputs) -> Outputs:
        """Apply the branches, join their outputs and shuffle the channels."""
        if self.left:
            joined = torch.cat([getattr(self, self.left)(x), getattr(self, self.right)(x)], 1)
        else:
            passed, taken = x.chunk(2, 1)
            joined = torch.cat([passed, getattr(self, self.right)(taken)], 1)
        return joined.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class MegviiUnit(nn.Module):
    """A unit that splits its channels into even and odd ones and does not shuffle its output.

    Args:
      inputs: number of input channels; with stride 2 also the output channels of the left branch.
      outputs: number of output channels.
      stride: 1, or 2 for the first unit of a stage, which has a left branch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        passed = inputs if stride == 2 else half
        entering = inputs if stride == 2 else half
        layers = [(pointwise(entering, half), True), (depthwise(half, stride), False)]
        self.branch_main = numbered([*layers, (pointwise(half, outputs - passed), True)])
        if stride == 2:
            self.branch_proj = numbered([(depthwise(inputs, 2), False), (pointwise(inputs, inputs), True)])
        self.stride = stride

    def forward(self, x: Inputs) -> Outputs:
        """Apply the branches and join their outputs."""
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], 1)


def stages(table: Table, unit: MakeUnit) -> list[list[nn.Module]]:
    """Return the units of each stage.

    Args:
      table: channels and repeats of the network.
      unit: builds a unit.
    """
    inputs = table.channels[0]
    built: list[list[nn.Module]] = []
    for count, outputs in zip(table.repeats, table.channels[1:], strict=False):
        built.append([unit(inputs if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(count)])
        inputs = outputs
    return built


def stem(in_chans: int, outputs: int, stride: int) -> list[Layer]:
    """Return the first layer of a network: a 3x3 convolution with ReLU.

    Args:
      in_chans: channels of the images.
      outputs: number of output channels.
      stride: along both axes.
    """
    return [(nn.Conv2d(in_chans, outputs, 3, stride, 1, bias=False), True)]


def forward(
    x: Inputs,
    conv1: nn.Module,
    units: Iterable[Iterable[nn.Module]],
    conv5: nn.Module | None,
    fc: nn.Module | None,
    *,
    small_stem: bool,
) -> tuple[Float[torch.Tensor, "batch classes"] | None, Features]:
    """Run a network on images.

    Args:
      x: the images, normalized.
      conv1: the first convolution with batch norm and ReLU.
      units: the units of each stage.
      conv5: the last convolution with batch norm and ReLU; None for a backbone without it.
      fc: the classifier; None for a network without one.
      small_stem: whether conv1 has stride 1 and no max pool follows.

    Returns:
      The logits, None without a classifier, and the features of `model.ShuffleNetV2`, channels first.
    """
    x = conv1(x)
    features: Features = {"stem": x if small_stem else nn.functional.max_pool2d(x, 3, 2, 1)}
    x = features["stem"]
    for name, stage in zip(STAGES, units, strict=True):
        for unit in stage:
            x = unit(x)
        features[name] = x
    if conv5 is None:
        return None, features
    features["conv5"] = conv5(x)
    features["pooled"] = features["conv5"].mean((2, 3))
    return None if fc is None else fc(features["pooled"]), features


class MMPretrainNet(nn.Module):
    """A network with MMPretrain's parameter names: `backbone.conv1`, `backbone.layers` and `head.fc`.

    Args:
      table: channels and repeats of the network.
      num_classes: number of classes; 0 leaves the classifier out.
      conv5: whether the network has conv5.
      in_chans: channels of the images.
      small_stem: whether conv1 has stride 1 and no max pool follows.
    """

    def __init__(
        self, table: Table, num_classes: int, *, conv5: bool = True, in_chans: int = 3, small_stem: bool = False
    ) -> None:
        super().__init__()
        first, *_, last, outputs = table.channels
        self.small_stem = small_stem
        self.backbone, self.head = nn.Module(), nn.Module()
        (self.backbone.conv1,) = named(stem(in_chans, first, 1 if small_stem else 2))
        units = stages(table, partial(TorchvisionUnit, nest=named))
        self.backbone.layers = nn.ModuleList(nn.Sequential(*stage) for stage in units)
        if conv5:
            self.backbone.layers.extend(named([(pointwise(last, outputs), True)]))
        self.head.fc = nn.Linear(outputs, num_classes) if num_classes else None

    def forward(self, x: Inputs) -> tuple[torch.Tensor | None, Features]:
        """Return logits and features of images, as the function `forward` does."""
        *units, conv5 = [*self.backbone.layers, None][:4]
        return forward(x, self.backbone.conv1, units, conv5, self.head.fc, small_stem=self.small_stem)


class SequentialNet(nn.Module):
    """A network with the parameter names of the other projects, whose layers are flat sequences.

    Args:
      table: channels and repeats of the network.
      num_classes: number of classes; 0 leaves the classifier out.
      conv5: whether the network has conv5.
      in_chans: channels of the images.
      small_stem: whether conv1 has stride 1 and no max pool follows.
      unit: builds a unit.
      first: attribute of the first convolution.
      last: attribute of the last convolution.
      fc: attribute of the classifier.
      flat: whether all units are in one sequence `features`, instead of `stage2`, `stage3` and `stage4`.
      bias: whether the classifier has a bias.
    """

    def __init__(
        self,
        table: Table,
        num_classes: int,
        *,
        conv5: bool = True,
        in_chans: int = 3,
        small_stem: bool = False,
        unit: MakeUnit,
        first: str,
        last: str,
        fc: str,
        flat: bool,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.small_stem = small_stem
        stem_channels, *_, inputs, outputs = table.channels
        self.units = stages(table, unit)  # PyTorch does not register modules in lists.
        self.first, self.last, self.fc_name = first, last, fc
        self.add_module(first, numbered(stem(in_chans, stem_channels, 1 if small_stem else 2)))
        if flat:
            self.features = nn.Sequential(*(unit for stage in self.units for unit in stage))
        else:
            for name, stage in zip(STAGES, self.units, strict=True):
                self.add_module(name, nn.Sequential(*stage))
        self.add_module(last, numbered([(pointwise(inputs, outputs), True)]) if conv5 else None)
        classifier = nn.Linear(outputs, num_classes, bias=bias) if num_classes else None
        self.add_module(fc, nn.Sequential(classifier) if classifier and fc == "classifier" else classifier)

    def forward(self, x: Inputs) -> tuple[torch.Tensor | None, Features]:
        """Return logits and features of images, as the function `forward` does."""
        conv1, conv5, fc = (getattr(self, name) for name in (self.first, self.last, self.fc_name))
        return forward(x, conv1, self.units, conv5, fc, small_stem=self.small_stem)


class MakeNetwork(Protocol):
    """A function that builds a network with fresh weights, for one project's parameter names."""

    def __call__(
        self, table: Table, num_classes: int, *, conv5: bool = True, in_chans: int = 3, small_stem: bool = False
    ) -> nn.Module:
        """Build a network; the arguments are those of MMPretrainNet."""


class _Names(TypedDict):
    """The arguments of SequentialNet that all networks of a project share."""

    unit: MakeUnit
    first: str
    last: str
    fc: str
    bias: bool


MEGVII: _Names = {
    "unit": MegviiUnit,
    "first": "first_conv",
    "last": "conv_last",
    "fc": "classifier",
    "bias": False,
}
ERICSUN99_UNIT = partial(TorchvisionUnit, left="banch1", right="banch2")  # The misspelling is the project's own.
NETWORKS: dict[str, MakeNetwork] = {  # {dialect: builds its network}
    "mmpretrain": MMPretrainNet,
    "torchvision": partial(SequentialNet, unit=TorchvisionUnit, first="conv1", last="conv5", fc="fc", flat=False),
    "megvii": partial(SequentialNet, **MEGVII, flat=True),
    "megvii-stages": partial(SequentialNet, **MEGVII, flat=False),
    "ericsun99": partial(
        SequentialNet, unit=ERICSUN99_UNIT, first="conv1", last="conv_last", fc="classifier", flat=True
    ),
}


def network_like(module: ShuffleNetV2, dialect: str) -> nn.Module:
    """Build the PyTorch network that corresponds to a JAX one, with fresh weights.

    Args:
      module: the JAX network.
      dialect: a key of NETWORKS, whose parameter names the network has.
    """
    return NETWORKS[dialect](
        module.table,
        module.num_classes,
        conv5=module.conv5,
        in_chans=module.in_chans,
        small_stem=module.small_stem,
    )
