import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from shufflenet_jax import lowerings
from shufflenet_jax.batch_groups import AXIS, BatchGroups
from shufflenet_jax.lowerings import cpu, direct, gpu, pieces, reference, shuffle

SIZES = [(8, 8), (7, 9), (1, 5), (2, 1)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_channel_shuffle_is_pytorchs():
    x = normal(2, 3, 4, 12)
    theirs = torch.nn.functional.channel_shuffle(torch.from_numpy(x.transpose(0, 3, 1, 2)), 2)
    assert_allclose(shuffle.channel_shuffle(x), theirs.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("split", [shuffle.channel_shuffle, shuffle.split_even_odd])
def test_channels_are_shuffled_and_split_along_any_axis(split):
    x = normal(2, 3, 4, 6)
    by_last, by_first = split(x), split(x.transpose(3, 1, 2, 0), axis=0)
    for last, first in zip(jax.tree.leaves(by_last), jax.tree.leaves(by_first), strict=True):
        assert_allclose(first.transpose(3, 1, 2, 0), last)


def test_even_and_odd_channels_put_back_together_are_the_input():
    x = normal(1, 2, 2, 6)
    even, odd = shuffle.split_even_odd(x)
    assert_allclose(shuffle.channel_shuffle(np.concatenate([even, odd], -1)), x)


def run(lower, operation, x, *weights, wrap=jax.jit):
    """An operation in a lowering's axis order, from and to (B, H, W, C)."""

    def whole(x, *weights):
        return lower.to_nhwc(operation(lower, lower.from_nhwc(x), *weights))

    return jax.vjp(wrap(whole), x, *weights)


@pytest.mark.parametrize("lower", [cpu, gpu, reference])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel", "groups"), [((3, 3, 1, 6), 6), ((3, 3, 6, 4), 1), ((1, 1, 6, 4), 1)])
def test_convolutions_and_their_gradients_are_pytorchs(x64, kernel, groups, size, stride, lower):
    x, weights = normal(2, *size, 6), normal(*kernel, seed=1)
    ours, pull = run(lower, lambda low, x, w: low.conv(x, w, stride=stride, groups=groups), x, weights)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x.transpose(0, 3, 1, 2), weights.transpose(3, 2, 0, 1))]
    theirs = torch.nn.functional.conv2d(*tensors, stride=stride, padding=(kernel[0] - 1) // 2, groups=groups)
    # float64 sums of at most 54 products, in two orders.
    assert_allclose(ours, theirs.detach().numpy().transpose(0, 2, 3, 1), atol=1e-12)

    cotangent = normal(*ours.shape, seed=2)
    theirs.backward(torch.from_numpy(cotangent.transpose(0, 3, 1, 2)))
    dx, dw = pull(cotangent)
    assert_allclose(dx, tensors[0].grad.numpy().transpose(0, 2, 3, 1), atol=1e-12)
    assert_allclose(dw, tensors[1].grad.numpy().transpose(2, 3, 1, 0), atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel", "groups"), [((3, 3, 1, 6), 6), ((3, 3, 6, 4), 1), ((1, 1, 6, 4), 1)])
def test_operations_for_inference_are_those_of_the_reference(x64, kernel, groups, size, stride):
    x, weights = normal(2, *size, 6), normal(*kernel, seed=1)
    ours, theirs = (lower.conv(x, weights, stride=stride, groups=groups) for lower in (direct, reference))
    assert_allclose(ours, theirs, atol=1e-12)  # As above.
    assert_allclose(direct.max_pool(x - 5), reference.max_pool(x - 5))


@pytest.mark.parametrize("lower", [cpu, gpu, reference])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_and_its_gradients_are_pytorchs(x64, relu, lower):
    x, scale, bias = normal(3, 5, 4, 6) + 2, normal(6, seed=1), normal(6, seed=2)
    ours, pull = run(
        lower,
        lambda low, *a: low.batch_norm(*a, BatchGroups(), epsilon=1e-5, relu=relu)[0],
        x,
        scale,
        bias,
    )
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x.transpose(0, 3, 1, 2), scale, bias)]
    theirs = torch.nn.functional.batch_norm(tensors[0], None, None, *tensors[1:], training=True)
    theirs = theirs.relu() if relu else theirs
    assert_allclose(ours, theirs.detach().numpy().transpose(0, 2, 3, 1), atol=1e-12)
    cotangent = normal(*ours.shape, seed=3)
    theirs.backward(torch.from_numpy(cotangent.transpose(0, 3, 1, 2)))
    dx, *others = pull(cotangent)
    # Differences of float64 sums over 60 values.
    assert_allclose(dx, tensors[0].grad.numpy().transpose(0, 2, 3, 1), atol=1e-12)
    for ours, tensor in zip(others, tensors[1:], strict=True):
        assert_allclose(ours, tensor.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("lower", [cpu, gpu, reference])
@pytest.mark.parametrize("relu", [False, True])
def test_groups_have_statistics_of_their_own_and_padding_has_no_part_in_them(x64, relu, lower):
    """Two groups of four rows, of which three are real: as if each group's three had been alone."""
    x, scale, bias = normal(8, 5, 4, 6) + 2, normal(6, seed=1), normal(6, seed=2)
    real = np.tile(np.arange(4) < 3, 2)
    cotangent = normal(8, 5, 4, 6, seed=3) * real[:, None, None, None]
    split = BatchGroups(size=4, mask=np.float32(real))
    found = {}

    def together(low, *arrays):
        y, *found["statistics"] = low.batch_norm(*arrays, split, epsilon=1e-5, relu=relu)
        return y

    ours, pull = run(lower, together, x, scale, bias, wrap=jax.named_call)  # Not compiled, for `found`.
    statistics, gradients = found["statistics"], pull(cotangent)
    alone = []
    for group in (slice(0, 3), slice(4, 7)):

        def one(low, *arrays):
            y, *found["statistics"] = low.batch_norm(*arrays, BatchGroups(), epsilon=1e-5, relu=relu)
            return y

        theirs, pull = run(reference, one, x[group], scale, bias, wrap=jax.named_call)
        assert_allclose(ours[group], theirs, atol=1e-12)  # Sums of 60 values in another order.
        alone.append((found["statistics"], pull(cotangent[group])))
        assert_allclose(gradients[0][group], alone[-1][1][0], atol=1e-12)
    for i in (0, 1):
        assert_allclose(statistics[i], (alone[0][0][i] + alone[1][0][i]) / 2, atol=1e-12)
        assert_allclose(gradients[i + 1], alone[0][1][i + 1] + alone[1][1][i + 1], atol=1e-11)
    assert not np.asarray(gradients[0][~real]).any()


@pytest.mark.parametrize("lower", [cpu, gpu, reference])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "mean", "near"),
    [
        ("float64", 2, 1e-11),  # Sums of up to 36 values, in another order.
        ("float64", 1e5, 1e-8),  # Values keep 16 digits, and the mean takes 5 of them.
        ("float32", 2, 1e-5),
        # float32 keeps 1e4 to a thousandth of the deviation, which decides everything here; squares about zero would
        # keep no digit at all.
        ("float32", 1e4, 2e-2),
    ],
)
def test_devices_that_hold_a_group_together_have_its_statistics(x64, lower, masked, dtype, mean, near):
    """Two groups of four images on two devices each, as one device in float64 sees each group alone."""
    x, cotangent = (normal(4, 2, 3, 3, 5) + mean).astype(dtype), normal(4, 2, 3, 3, 5, seed=3).astype(dtype)
    scale, bias = normal(5, seed=1).astype(dtype), normal(5, seed=2).astype(dtype)
    # The last device has nothing but padding.
    mask = np.array([[1, 1], [1, 0], [1, 1], [0, 0]] if masked else np.ones((4, 2)), dtype)
    cotangent *= mask[..., None, None, None]

    def on_a_device(x, cotangent, mask):
        groups = BatchGroups(spans=((0, 1), (2, 3)), mask=mask if masked else None)
        (y, statistics), pull = jax.vjp(partial(normalized, lower, groups), x, scale, bias)
        return y, statistics, pull((cotangent, jax.tree.map(jnp.zeros_like, statistics)))

    mapped = jax.pmap(on_a_device, AXIS)
    assert collectives_of(jax.make_jaxpr(mapped)(x, cotangent, mask)) == 2, "one each way"
    y, statistics, gradients = mapped(x, cotangent, mask)
    for devices in (slice(0, 2), slice(2, 4)):
        real = mask[devices] > 0
        arrays = [np.float64(array[devices][real]) for array in (x, cotangent)]
        vectors = np.float64(scale), np.float64(bias)
        (alone, expected), pull = jax.vjp(partial(normalized, reference, BatchGroups()), arrays[0], *vectors)
        dx, *others = pull((arrays[1], jax.tree.map(jnp.zeros_like, expected)))
        assert_allclose(y[devices][real], alone, atol=near)
        assert_allclose(gradients[0][devices][real], dx, atol=near)
        for ours, theirs in zip(statistics, expected, strict=True):
            assert np.array_equal(*ours[devices]), "both devices have the same bits"
            assert_allclose(ours[devices][0], theirs, rtol=near)
        for ours, theirs in zip(gradients[1:], others, strict=True):
            assert_allclose(ours[devices].sum(0), theirs, atol=10 * near)  # Sums over the group.


def normalized(lower, groups, x, scale, bias):
    """(batch norm and ReLU of images (B, H, W, C), (mean, variance))."""
    y, *statistics = lower.batch_norm(lower.from_nhwc(x), scale, bias, groups, epsilon=1e-5, relu=True)
    return lower.to_nhwc(y), tuple(statistics)


def collectives_of(jaxpr):
    """How many operations of a program exchange numbers between devices."""
    return len(re.findall(r"\b(?:psum|all_gather|reduce_scatter|ppermute|all_to_all)\w*\[", str(jaxpr)))


@pytest.mark.parametrize("lower", [cpu, gpu])
@pytest.mark.parametrize(
    ("kernel", "stride", "groups"), [((3, 3, 1, 8), 1, 8), ((3, 3, 1, 8), 2, 8), ((1, 1, 8, 8), 1, 1)]
)
def test_lowerings_agree_in_bfloat16_to_its_resolution(kernel, stride, groups, lower):
    x, weights = (jnp.asarray(a, jnp.bfloat16) for a in (normal(2, 9, 9, 8), normal(*kernel, seed=1)))
    scale = jnp.linspace(0.5, 2, 8)

    def layer(low, x, w):
        return low.batch_norm(
            low.conv(x, w, stride=stride, groups=groups),
            scale,
            0 * scale,
            BatchGroups(),
            epsilon=1e-5,
            relu=True,
        )[0]

    (ours, pull_ours), (theirs, pull_theirs) = (run(low, layer, x, weights) for low in (lower, reference))
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    pairs = [(ours, theirs), *zip(pull_ours(ours), pull_theirs(ours), strict=True)]
    for mine, exact in pairs:
        mine, exact = np.float32(mine), np.float32(exact)
        # bfloat16 keeps 8 bits; each layer rounds three times, and a few values that cancel show it most.
        assert_allclose(mine, exact, atol=6 * 2**-8 * np.abs(exact).max())


@pytest.mark.parametrize("lower", [cpu, gpu, reference])
@pytest.mark.parametrize("size", SIZES)
def test_max_pool_and_its_gradient_are_pytorchs_also_for_negative_values_and_ties(x64, size, lower):
    # Few values, so that many windows hold their largest more than once; padding with zeros would win everywhere.
    x = normal(2, *size, 3).round() - 5
    ours, pull = run(lower, lambda low, x: low.max_pool(x), x)
    tensor = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    theirs = torch.nn.functional.max_pool2d(tensor, 3, 2, 1)
    assert_allclose(ours, theirs.detach().numpy().transpose(0, 2, 3, 1))
    cotangent = normal(*ours.shape, seed=2)
    theirs.backward(torch.from_numpy(cotangent.transpose(0, 3, 1, 2)))
    assert_allclose(pull(cotangent)[0], tensor.grad.numpy().transpose(0, 2, 3, 1), atol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "mean", "tolerance"),
    [
        (np.float32, 1000, 1e-3),  # Sums about one of the values, which float32 keeps to 1e-4 of a deviation.
        (jnp.bfloat16, 100, 2e-2),  # Sums about 0. Rounding the values to 0.5 has added 0.5**2 / 12, which is 2 % too.
    ],
)
def test_the_variance_on_gpus_keeps_the_digits_that_the_values_have(x64, dtype, mean, tolerance):
    x = jnp.asarray(normal(4, 9, 9, 2) + mean, dtype)
    scale, bias = np.ones(2, np.float32), np.zeros(2, np.float32)
    _, *ours = gpu.batch_norm(x, scale, bias, BatchGroups(size=2), epsilon=1e-5, relu=True)
    exact = np.float64(x).reshape(2, -1, 2)
    assert_allclose(ours[0], exact.mean((0, 1)), rtol=1e-6)
    assert_allclose(ours[1], exact.var(1, ddof=1).mean(0), rtol=tolerance)


@pytest.mark.parametrize("even_odd", [True, False])
def test_channels_that_are_followed_are_those_that_are_shuffled(even_odd):
    """Through a stage of five units, each of which doubles what goes right; then in their own order again."""
    x, lowered = normal(1, 2, 2, 12), pieces.as_pieces(normal(1, 2, 2, 12))
    for _ in range(5):
        left, right = shuffle.split(x, even_odd=even_odd)
        x = shuffle.join(left, 2 * right, shuffled=not even_odd)
        left, right = pieces.split(lowered, even_odd=even_odd)
        assert_allclose(pieces.as_array(right), shuffle.split(pieces.as_array(lowered), even_odd=even_odd)[1])
        lowered = pieces.join(left, 2 * pieces.as_array(right), shuffled=not even_odd)
        assert_allclose(pieces.as_array(lowered), x)


def test_an_unknown_lowering_is_named():
    with pytest.raises(ValueError, match="'fast'"):
        lowerings.resolve("fast")


@pytest.mark.parametrize("lower", [cpu, direct])
def test_a_convolution_that_the_network_does_not_have_is_refused(lower):
    with pytest.raises(ValueError, match="2 groups"):
        lower.conv(np.ones((4, 4, 4, 1), np.float32), np.ones((3, 3, 2, 4), np.float32), groups=2)
