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
from shufflenet_jax.config import MMPRETRAIN_EVAL, TrainConfig
from shufflenet_jax.data import transforms
from shufflenet_jax.data.pipeline import eval_batches
from shufflenet_jax.data.sources import open_source
from shufflenet_jax.model import ShuffleNetV2, variable_shapes
from shufflenet_jax.porting import convert, dialects, reference
from shufflenet_jax.training import create_state, decays, make_optimizer, make_schedule, train_step

IN1K = TrainConfig(data="imagenet", warmup_steps=5000)
TOTAL = 375_600
NOISE = 1e-12  # Some thousand times what float64 rounds the stem's values by.


def test_the_learning_rate_is_the_published_runs():
    learning_rate = make_schedule(IN1K, TOTAL)
    expected = {0: 0.05, 4999: 0.0493345, 5000: 0.493344, 187_800: 0.25, TOTAL - 1: 1.3312e-6}
    for step, rate in expected.items():
        assert_allclose(learning_rate(np.int32(step)), rate, rtol=1e-5, err_msg=str(step))  # Six printed digits.


def test_all_but_batch_norm_decays():
    flags = flatten_dict(decays(variable_shapes(ShuffleNetV2())["params"]))
    assert {path[-2:] for path, decaying in flags.items() if not decaying} == {("bn", "scale"), ("bn", "bias")}
    kept = {"fc/bias", "fc/kernel", "stage2_unit1/right_dw/conv/kernel", "conv1/conv/kernel"}
    assert kept <= {"/".join(path) for path, decaying in flags.items() if decaying}


# Steps against PyTorch


class Step:
    """Three ways to see the same training: {kind of tensor: {key: array}} after some steps."""

    def __init__(self, tensors, images, labels, *, dialect="torchvision", steps=1):
        self.tensors, self.images, self.labels, self.steps = tensors, images, labels, steps
        self.dialect, self.rules = dialect, dialects.DIALECTS[dialect]
        self.config = dataclasses.replace(IN1K, warmup_steps=steps - 1)  # The last step is across the warm-up's edge.

    def in_jax(self, dtype):
        module = dialects.module_for(self.tensors, self.rules).clone(dtype=np.dtype(dtype))
        variables, _ = dialects.from_torch(self.tensors, self.rules, module)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        devices = jax.devices()[:1]
        step = parallel.map_train_step(partial(train_step, module, MMPRETRAIN_EVAL, 0), devices)
        state = parallel.replicate(create_state(module, make_optimizer(self.config, TOTAL), variables), devices)
        for batch in parallel.feed([{"images": self.images, "labels": self.labels}] * self.steps, devices):
            state, metrics = step(state, batch)
        momentum = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_trace) if is_trace(s)).trace
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
        inputs = np.asarray(transforms.normalize(self.images, MMPRETRAIN_EVAL, dtype))
        inputs = torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy())
        for t in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (TOTAL - t) / TOTAL * (0.1 if t < self.steps - 1 else 1)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(inputs)[0], torch.from_numpy(self.labels).long())
            loss.backward()
            optimizer.step()
        momentum = {key: optimizer.state[p]["momentum_buffer"].numpy() for key, p in network.named_parameters()}
        return self.by_kind({k: v.numpy() for k, v in network.state_dict().items()}, momentum), loss.item()

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


def is_trace(node):
    return hasattr(node, "trace")


def assert_same_to(share, ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensors in theirs.items():
        largest = max(np.abs(array).max() for array in tensors.values())
        assert largest > 0, name
        difference = max(np.abs(ours[name][key] - array).max() for key, array in tensors.items())
        assert difference <= share * largest, name


@pytest.mark.parametrize("dialect", ["torchvision", "megvii"])
def test_two_steps_in_float64_are_pytorchs_in_both_wirings(x64, dialect):
    network = lively_network(dialect)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    tensors = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    step = Step(tensors, images, rng.integers(0, 10, 8).astype(np.int32), dialect=dialect, steps=2)
    (ours, our_loss), (theirs, their_loss) = step.in_jax("float64"), step.in_pytorch("float64")
    assert_allclose(our_loss, their_loss, rtol=1e-9)
    # float64 rounds 1e-16; batch norm over 32 values a channel in stage4 and two steps amplify it.
    assert_same_to(1e-7, ours, theirs)


def test_devices_take_the_mean_of_their_gradients_and_statistics_and_keep_equal_copies(x64):
    """The step of two devices is the mean of the steps that each would take alone: SGD's first step is linear."""
    module, variables = convert_network(lively_network("torchvision"), "torchvision")
    module = module.clone(dtype=np.float64)
    variables = jax.tree.map(np.float64, variables)
    rng = np.random.default_rng(0)
    batch = {"images": rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), "labels": np.arange(8, dtype=np.int32)}

    def step(batch, count):
        devices = jax.devices()[:count]
        mapped = parallel.map_train_step(partial(train_step, module, MMPRETRAIN_EVAL, 0), devices)
        state = parallel.replicate(create_state(module, make_optimizer(IN1K, TOTAL), variables), devices)
        state, _ = mapped(state, next(parallel.feed([batch], devices)))
        for leaf in jax.tree.leaves(state):
            copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert len(copies) == count and all(np.array_equal(copy, copies[0]) for copy in copies)
        return jax.device_get(state.variables)

    halves = [step({key: value[rows] for key, value in batch.items()}, 1) for rows in (slice(4), slice(4, 8))]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    for ours, theirs in zip(*map(jax.tree.leaves, (step(batch, 2), mean)), strict=True):
        assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.fixture(scope="module")
def real_steps(shared):
    """Steps from the real 1.0x weights, on 8 real images each, at which the network has a gradient."""
    file = convert.read(shared / "weights/shufflenet_v2_x1_0_torchvision.pth")
    source = open_source(shared / "imagenet-val227")
    batch = next(iter(eval_batches(source, MMPRETRAIN_EVAL, batch_size=96)))
    usable = [i for i, image in enumerate(batch["images"]) if is_differentiable(image, file.tensors["conv1.0.weight"])]
    assert len(usable) >= 24
    parts = [usable[start : start + 8] for start in (0, 8, 16)]
    return [Step(file.tensors, batch["images"][part], batch["labels"][part]) for part in parts]


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
def test_a_step_from_the_real_weights_on_real_images_is_pytorchs_in_float64(x64, real_steps):
    for step in real_steps:
        (ours, our_loss), (theirs, their_loss) = step.in_jax("float64"), step.in_pytorch("float64")
        assert_allclose(our_loss, their_loss, rtol=1e-9)
        # What rounding leaves is below 1e-13; a wrong term in any gradient is far above.
        assert_same_to(1e-7, ours, theirs)


@pytest.mark.real_data
def test_a_step_in_float32_is_as_near_to_float64_as_pytorchs(real_steps):
    ratios = {}
    for step in real_steps:
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
