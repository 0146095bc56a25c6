import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
import torch
from conftest import convert_network, lively_network
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose

from shufflenet_jax import parallel
from shufflenet_jax.config import MMPRETRAIN_EVAL, PRESETS
from shufflenet_jax.data import transforms
from shufflenet_jax.data.pipeline import train_batches
from shufflenet_jax.data.sources import Example, Source, open_source
from shufflenet_jax.model import ShuffleNetV2, variable_shapes
from shufflenet_jax.porting import convert, dialects, reference
from shufflenet_jax.rows import Epoch, plan_layout
from shufflenet_jax.training import (
    create_state,
    cross_entropy,
    decay_table,
    decays,
    make_optimizer,
    make_schedule,
    train_step,
)

IN1K = PRESETS["in1k"]
TOTAL = 375_600
NOISE = 1e-12  # Some thousand times what float64 rounds the stem's values by.


def test_the_learning_rate_is_the_published_runs():
    learning_rate = make_schedule(IN1K, TOTAL)
    expected = {0: 0.05, 4999: 0.0493345, 5000: 0.493344, 187_800: 0.25, TOTAL - 1: 1.3312e-6}
    for step, rate in expected.items():
        assert_allclose(learning_rate(np.int32(step)), rate, rtol=1e-5, err_msg=str(step))  # Six printed digits.


def test_a_cosine_falls_as_pytorchs_does():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    learning_rate = make_schedule(PRESETS["cifar10"], 40)
    for step in range(40):
        # float32's resolution, of the rate and of the cosine's argument.
        assert_allclose(learning_rate(np.int32(step)), scheduler.get_last_lr()[0], rtol=1e-5, atol=1e-8)
        optimizer.step()
        scheduler.step()


def test_an_epoch_of_in1k_has_1252_steps_and_its_last_has_16_groups_of_9():
    for devices in (1, 8, 32, 256):
        layout = plan_layout(IN1K.batch_size, IN1K.bn_group_size, devices, most=64)
        epoch = Epoch(1_281_167, layout)
        assert (epoch.steps, epoch.steps * IN1K.epochs) == (1252, TOTAL)
        assert epoch.left == 144 and layout.groups == 16
        assert layout.rows * layout.parts * devices == 1024 and layout.rows <= 64
        spans = layout.rows_of().spans
        assert (len(spans) if spans else None) == (None if devices < 32 else 16)


@pytest.mark.parametrize("which", ["no_norm", "matrices"])
def test_the_table_of_decay_adds_up(which):
    sizes = [p.numel() for p in reference.NETWORKS["torchvision"](1.0, 1000).parameters() if p.ndim > 1]
    sizes += [1000] if which == "no_norm" else []
    lines = decay_table(variable_shapes(ShuffleNetV2())["params"], which).splitlines()[1:]
    kinds = {line[:24].strip(): line[24:].replace(",", "").split() for line in lines}
    assert sum(int(size) for _, size, _ in kinds.values()) == 2_278_604
    on = [(int(n), int(size)) for n, size, flag in kinds.values() if flag == "yes"]
    assert tuple(map(sum, zip(*on, strict=True))) == (len(sizes), sum(sizes))
    assert kinds["bn/scale"][2] == kinds["bn/bias"][2] == "no" and kinds["depthwise conv/kernel"][2] == "yes"
    assert kinds["fc/bias"][2] == ("yes" if which == "no_norm" else "no")


def test_smoothed_losses_are_pytorchs(x64):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    for smoothing in (0.0, 0.1):
        theirs = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=smoothing, reduction="none"
        )
        assert_allclose(cross_entropy(logits, labels, smoothing), theirs, rtol=1e-12)


def test_all_but_batch_norm_decays():
    flags = flatten_dict(decays(variable_shapes(ShuffleNetV2())["params"]))
    assert {path[-2:] for path, decaying in flags.items() if not decaying} == {("bn", "scale"), ("bn", "bias")}
    kept = {"fc/bias", "fc/kernel", "stage2_unit1/right_dw/conv/kernel", "conv1/conv/kernel"}
    assert kept <= {"/".join(path) for path, decaying in flags.items() if decaying}


# Steps against PyTorch


class Step:
    """Two ways to see the same training: {kind of tensor: {key: array}} after some steps, a batch for each."""

    def __init__(self, tensors, images, labels, *, dialect="torchvision", groups=1, **recipe):
        self.tensors, self.images, self.labels, self.groups = tensors, images, labels, groups
        self.dialect, self.rules = dialect, dialects.DIALECTS[dialect]
        steps, batch_size = labels.shape
        changes = {"batch_size": batch_size, "bn_group_size": batch_size // groups, **recipe}
        # The last step is across the warm-up's edge.
        self.config = dataclasses.replace(IN1K, warmup_steps=steps - 1, **changes)

    def in_jax(self, dtype):
        module = dialects.module_for(self.tensors, self.rules).clone(dtype=np.dtype(dtype))
        variables, _ = dialects.from_torch(self.tensors, self.rules, module)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        state = create_state(module, make_optimizer(self.config, TOTAL), variables)
        batches = [{"images": i, "labels": y} for i, y in zip(self.images, self.labels, strict=True)]
        state, metrics = run_steps(module, self.config, state, batches, jax.devices()[:1])
        momentum = momentum_of(state)
        tensors = dialects.to_torch(state.variables, self.rules, None)
        momentum = dialects.to_torch({"params": momentum}, self.rules, None)
        return self.by_kind(tensors, momentum), float(metrics["loss"])

    def in_pytorch(self, dtype):
        module = dialects.module_for(self.tensors, self.rules)
        network = reference.NETWORKS[self.dialect](module.width, module.num_classes)
        network.load_state_dict({key: torch.from_numpy(array.copy()) for key, array in self.tensors.items()})
        network.to(getattr(torch, dtype)).train()
        norms = {p for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
        groups = [
            {"params": [p for p in network.parameters() if p not in norms], "weight_decay": 4e-5},
            {"params": list(norms), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
        statistics = [buffer for key, buffer in network.named_buffers() if "running" in key]
        for t, (images, labels) in enumerate(zip(self.images, self.labels, strict=True)):
            inputs = np.asarray(transforms.normalize(images, MMPRETRAIN_EVAL, dtype)).transpose(0, 3, 1, 2)
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (TOTAL - t) / TOTAL * (0.1 if t < len(self.labels) - 1 else 1)
            optimizer.zero_grad()
            before, after, total = [buffer.clone() for buffer in statistics], [], 0.0
            # Each group is what a GPU of its own would see: its gradient is one of those that DDP averages.
            for rows in np.split(np.arange(len(labels)), self.groups):
                for buffer, old in zip(statistics, before, strict=True):
                    buffer.copy_(old)
                loss = torch.nn.functional.cross_entropy(
                    network(torch.from_numpy(inputs[rows].copy()))[0],
                    torch.from_numpy(labels[rows]).long(),
                    label_smoothing=self.config.label_smoothing,
                )
                (loss / self.groups).backward()
                after.append([buffer.clone() for buffer in statistics])
                total += loss.item() / self.groups
            for buffer, found in zip(statistics, zip(*after, strict=True), strict=True):
                buffer.copy_(torch.stack(found).mean(0))
            optimizer.step()
        momentum = {key: optimizer.state[p]["momentum_buffer"].numpy() for key, p in network.named_parameters()}
        return self.by_kind({k: v.numpy() for k, v in network.state_dict().items()}, momentum), total

    @staticmethod
    def by_kind(tensors, momentum):
        kinds = {}
        for key, array in tensors.items():
            if not key.endswith("tracked"):
                statistic = "running statistics" if "running" in key else "parameters"
                kinds.setdefault(f"{statistic}, {kind(key, array)}", {})[key] = array
        for key, array in momentum.items():
            kinds.setdefault(f"momentum, {kind(key, array)}", {})[key] = array
        return kinds


def kind(key, array):
    """Tensors of like size: convolutions by their kernel, batch norm's four vectors, the classifier's two."""
    if array.ndim == 4:
        return f"{array.shape[2]}x{array.shape[3]}, {array.shape[1]} in" if array.shape[1] < 4 else "1x1"
    return key if array.ndim == 2 or key == "fc.bias" else key.rpartition(".")[2]


def momentum_of(state):
    return next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_trace) if is_trace(s)).trace


def is_trace(node):
    return hasattr(node, "trace")


def run_steps(module, config, state, batches, devices):
    """The state and the last metrics after a step on each batch."""
    layout = parallel.plan_batch(config, devices)
    step = parallel.map_train_step(partial(train_step, module, config, layout), devices)
    state = parallel.replicate(state, devices)
    for batch in parallel.feed(batches, layout, devices):
        state, metrics = step(state, batch)
    return state, metrics


def assert_same_to(share, ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensors in theirs.items():
        largest = max(np.abs(array).max() for array in tensors.values())
        assert largest > 0, name
        difference = max(np.abs(ours[name][key] - array).max() for key, array in tensors.items())
        assert difference <= share * largest, name


@pytest.mark.parametrize(("dialect", "smoothing"), [("torchvision", 0.1), ("megvii", 0.0)])
def test_two_steps_in_float64_are_pytorchs_in_both_wirings(x64, dialect, smoothing):
    network = lively_network(dialect)
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (1, 8, 64, 64, 3), dtype=np.uint8), 2, axis=0)
    labels = np.repeat(rng.integers(0, 10, (1, 8)).astype(np.int32), 2, axis=0)
    tensors = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    step = Step(tensors, images, labels, dialect=dialect, label_smoothing=smoothing)
    (ours, our_loss), (theirs, their_loss) = step.in_jax("float64"), step.in_pytorch("float64")
    assert_allclose(our_loss, their_loss, rtol=1e-9)
    # float64 rounds 1e-16; batch norm over 32 values a channel in stage4 and two steps amplify it.
    assert_same_to(1e-7, ours, theirs)


ROUTES = {  # devices, parts
    "one device": (1, 1),
    "four devices": (4, 1),
    "one device in four parts": (1, 4),
    "four devices in two parts, each group on two of them": (4, 2),
}


def test_devices_and_parts_do_not_change_a_training(x64):
    """Twenty steps over two epochs with uneven last batches; small ones, lest the network amplify rounding."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    data = Source(len(pixels), lambda i: Example(str(i), pixels[i], i % 10), 10, None)
    base = dataclasses.replace(IN1K, image_size=32, crop="center", batch_size=32, bn_group_size=8, learning_rate=1e-4)
    module, variables = convert_network(lively_network("torchvision"), "torchvision")
    module, variables = module.clone(small_stem=True, dtype=np.float64), jax.tree.map(np.float64, variables)
    ends = {}
    for name, (count, parts) in ROUTES.items():
        config = dataclasses.replace(base, accumulate=parts, warmup_steps=10)
        devices = jax.devices()[:count]
        layout = parallel.plan_batch(config, devices)
        assert Epoch(len(data), layout).steps == 10 and Epoch(len(data), layout).left == 12
        batches = list(train_batches(data, config, layout, stop_step=20))
        assert [batch["mask"].sum() for batch in batches if "mask" in batch] == [12, 12]
        batches = [{k: v for k, v in batch.items() if k != "damaged"} for batch in batches]
        state = create_state(module, make_optimizer(config, 1000), variables)
        state, metrics = run_steps(module, config, state, batches, devices)
        for leaf in jax.tree.leaves(state):
            copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert len(copies) == count and all(np.array_equal(copy, copies[0]) for copy in copies), name
        kinds = {**state.variables, "momentum": momentum_of(state), "metrics": metrics}
        ends[name] = {
            kind: {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
            for kind, tree in kinds.items()
        }
    expected = ends.pop("one device")
    for found in ends.values():
        assert_same_to(1e-7, found, expected)  # Sums in another order, in float64, amplified by twenty steps.


@pytest.fixture(scope="module")
def real_steps(shared):
    """Steps from the real 1.0x weights, on random crops of 16 real images each, at which the network has a gradient."""
    file = convert.read(shared / "weights/shufflenet_v2_x1_0_torchvision.pth")
    config = dataclasses.replace(IN1K, batch_size=96, bn_group_size=0)
    batch = next(iter(train_batches(open_source(shared / "imagenet-val227"), config, stop_step=1)))
    images = np.where(batch["flip"][:, None, None, None], batch["images"][:, :, ::-1], batch["images"])
    usable = [i for i, image in enumerate(images) if is_differentiable(image, file.tensors["conv1.0.weight"])]
    assert len(usable) >= 48
    rows = np.reshape(usable[:48], (3, 16))
    return file.tensors, images[rows], batch["labels"][rows]


def is_differentiable(image, weights):
    """Whether no max-pool window of the stem holds two largest values that rounding alone tells apart.

    The weights are rounded to int8 and the pixels to uint8, so that such ties do occur, and each side breaks them in
    its own way: noise of rounding's size then changes the gradient of the stem, here and in PyTorch.
    """
    inputs = torch.from_numpy(np.float64(transforms.normalize(image[None], MMPRETRAIN_EVAL)).transpose(0, 3, 1, 2))
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for noise in (0, NOISE, NOISE):
        kernel = torch.from_numpy(weights).double().requires_grad_()
        x = torch.nn.functional.conv2d(inputs, kernel, stride=2, padding=1)
        x = x + noise * torch.randn(x.shape, generator=generator)
        pooled = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        cotangent = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).double()
        gradients.append(torch.autograd.grad(pooled, kernel, cotangent)[0])
    return all(torch.allclose(gradients[0], other, atol=1e-9) for other in gradients[1:])


@pytest.mark.real_data
def test_three_steps_of_in1k_from_the_real_weights_on_real_images_are_pytorchs_in_float64(x64, real_steps):
    """Two groups of batch norm, across the warm-up's edge."""
    step = Step(*real_steps, groups=2)
    (ours, our_loss), (theirs, their_loss) = step.in_jax("float64"), step.in_pytorch("float64")
    assert_allclose(our_loss, their_loss, rtol=1e-9)
    # A wrong term in any gradient is far above.
    assert_same_to(1e-7, ours, theirs)


@pytest.mark.real_data
def test_a_step_in_float32_is_as_near_to_float64_as_pytorchs(real_steps):
    tensors, images, labels = real_steps
    ratios = {}
    for i in range(3):
        step = Step(tensors, images[i : i + 1, :8], labels[i : i + 1, :8])
        ours, theirs = step.in_jax("float32")[0], step.in_pytorch("float32")[0]
        with jax.enable_x64(True):
            exact = step.in_pytorch("float64")[0]
        for name in exact:
            ratios.setdefault(name, []).append(norm(ours[name], exact[name]) / norm(theirs[name], exact[name]))
    for name, found in ratios.items():
        # One ReLU or pool window that rounding decides the other way outweighs all else in a batch, on either side:
        # so the middle one of three batches is judged.
        assert np.median(found) <= 3, (name, found)


def norm(ours, theirs):
    """The Euclidean distance over all entries."""
    return np.sqrt(sum(np.sum((ours[key].astype(np.float64) - theirs[key]) ** 2) for key in theirs))
