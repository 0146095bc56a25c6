"""ShuffleNetV2 in PyTorch, in both wirings and under each dialect's own names: what the conversion is held against.

The modules nest as in the projects they stand for, so that a published state dict loads strictly and the key tables
of dialects.py are not needed. Written from the published descriptions; test_porting holds it against reference logits.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from ..architecture import STAGES, Table


class ConvModule(nn.Module):
    """MMPretrain's layer: convolution, batch norm and, where asked for, ReLU, under names."""

    def __init__(self, conv, relu):
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels)
        self.activate = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        return self.activate(self.bn(self.conv(x)))


def named(layers):
    """(convolution, ReLU?) pairs as MMPretrain nests them."""
    return nn.Sequential(*(ConvModule(conv, relu) for conv, relu in layers))


def numbered(layers):
    """(convolution, ReLU?) pairs as everyone else nests them: one flat sequence."""
    modules = []
    for conv, relu in layers:
        modules += [conv, nn.BatchNorm2d(conv.out_channels)] + [nn.ReLU()] * relu
    return nn.Sequential(*modules)


def pointwise(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def depthwise(channels, stride):
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)


class TorchvisionUnit(nn.Module):
    """Halves in, shuffle out. The names of the branches and how their layers nest are the dialect's."""

    def __init__(self, inputs, outputs, stride, nest=numbered, left="branch1", right="branch2"):
        super().__init__()
        half = outputs // 2
        self.left = left if stride == 2 else None
        self.right = right
        if self.left:
            self.add_module(left, nest([(depthwise(inputs, 2), False), (pointwise(inputs, half), True)]))
        entering = inputs if self.left else half
        layers = [(pointwise(entering, half), True), (depthwise(half, stride), False), (pointwise(half, half), True)]
        self.add_module(right, nest(layers))

    def forward(self, x):
        if self.left:
            joined = torch.cat([getattr(self, self.left)(x), getattr(self, self.right)(x)], 1)
        else:
            passed, taken = x.chunk(2, 1)
            joined = torch.cat([passed, getattr(self, self.right)(taken)], 1)
        return joined.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class MegviiUnit(nn.Module):
    """Even and odd channels in, no shuffle out; with stride 2 the left branch keeps its width."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        half = outputs // 2
        passed = inputs if stride == 2 else half
        entering = inputs if stride == 2 else half
        layers = [(pointwise(entering, half), True), (depthwise(half, stride), False)]
        self.branch_main = numbered([*layers, (pointwise(half, outputs - passed), True)])
        if stride == 2:
            self.branch_proj = numbered([(depthwise(inputs, 2), False), (pointwise(inputs, inputs), True)])
        self.stride = stride

    def forward(self, x):
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], 1)


def stages(table, unit):
    """The three stages of a table as lists of units."""
    inputs, built = table.channels[0], []
    for count, outputs in zip(table.repeats, table.channels[1:], strict=False):
        built.append([unit(inputs if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(count)])
        inputs = outputs
    return built


def stem(in_chans, outputs, stride):
    return [(nn.Conv2d(in_chans, outputs, 3, stride, 1, bias=False), True)]


def forward(x, conv1, units, conv5, fc, *, small_stem):
    """(logits, features) of (B, in_chans, H, W) images, with features as in `model.ShuffleNetV2` but NCHW."""
    x = conv1(x)
    features = {"stem": x if small_stem else nn.functional.max_pool2d(x, 3, 2, 1)}
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
    """Keys backbone.conv1, backbone.layers, head.fc."""

    def __init__(self, table: Table, num_classes, *, conv5=True, in_chans=3, small_stem=False):
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

    def forward(self, x):
        *units, conv5 = [*self.backbone.layers, None][:4]
        return forward(x, self.backbone.conv1, units, conv5, self.head.fc, small_stem=self.small_stem)


class SequentialNet(nn.Module):
    """Everyone else's nesting: flat sequences under names that the projects chose for themselves.

    Args:
      table: an architecture.Table.
      num_classes, conv5, in_chans, small_stem: as in `model.ShuffleNetV2`.
      unit: the class of the units.
      first, last, fc: attributes of the first convolution, the last one and the classifier.
      flat: all units in one sequence `features` instead of `stage2`, `stage3`, `stage4`.
    """

    def __init__(
        self,
        table: Table,
        num_classes,
        *,
        conv5=True,
        in_chans=3,
        small_stem=False,
        unit,
        first,
        last,
        fc,
        flat,
        bias=True,
    ):
        super().__init__()
        self.small_stem = small_stem
        stem_channels, *_, inputs, outputs = table.channels
        self.units = stages(table, unit)  # A list of lists: registers nothing.
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

    def forward(self, x):
        conv1, conv5, fc = (getattr(self, name) for name in (self.first, self.last, self.fc_name))
        return forward(x, conv1, self.units, conv5, fc, small_stem=self.small_stem)


MEGVII: dict[str, Any] = {
    "unit": MegviiUnit,
    "first": "first_conv",
    "last": "conv_last",
    "fc": "classifier",
    "bias": False,
}
ERICSUN99_UNIT = partial(TorchvisionUnit, left="banch1", right="banch2")
NETWORKS = {  # dialect: (table, num_classes, conv5=True, in_chans=3, small_stem=False) -> its network
    "mmpretrain": MMPretrainNet,
    "torchvision": partial(SequentialNet, unit=TorchvisionUnit, first="conv1", last="conv5", fc="fc", flat=False),
    "megvii": partial(SequentialNet, **MEGVII, flat=True),
    "megvii-stages": partial(SequentialNet, **MEGVII, flat=False),
    "ericsun99": partial(
        SequentialNet, unit=ERICSUN99_UNIT, first="conv1", last="conv_last", fc="classifier", flat=True
    ),
}


def network_like(module, dialect):
    """The network in PyTorch that a `model.ShuffleNetV2` is in JAX, under a dialect's names, with fresh weights."""
    return NETWORKS[dialect](
        module.table,
        module.num_classes,
        conv5=module.conv5,
        in_chans=module.in_chans,
        small_stem=module.small_stem,
    )
