import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from shufflenet_jax import ops

SIZES = [(8, 8), (7, 9), (1, 5), (2, 1)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_channel_shuffle_is_pytorchs():
    x = normal(2, 3, 4, 12)
    theirs = torch.nn.functional.channel_shuffle(torch.from_numpy(x.transpose(0, 3, 1, 2)), 2)
    assert_allclose(ops.channel_shuffle(x), theirs.numpy().transpose(0, 2, 3, 1))


def test_even_and_odd_channels_put_back_together_are_the_input():
    x = normal(1, 2, 2, 6)
    even, odd = ops.split_even_odd(x)
    assert_allclose(ops.channel_shuffle(np.concatenate([even, odd], -1)), x)


@pytest.mark.parametrize("lowering", ["shifted", "plain"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel", "groups"), [((3, 3, 1, 6), 6), ((3, 3, 6, 4), 1), ((1, 1, 6, 4), 1)])
def test_convolutions_and_their_gradients_are_pytorchs(x64, kernel, groups, size, stride, lowering):
    x, weights = normal(2, *size, 6), normal(*kernel, seed=1)
    ours, pull = jax.vjp(lambda x, w: ops.conv(x, w, stride=stride, groups=groups, lowering=lowering), x, weights)
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
def test_lowerings_agree_in_bfloat16_to_its_resolution(stride):
    x, weights = (jnp.asarray(a, jnp.bfloat16) for a in (normal(2, 9, 9, 8), normal(3, 3, 1, 8, seed=1)))
    ours, plain = (ops.conv(x, weights, stride=stride, groups=8, lowering=low) for low in ("shifted", "plain"))
    # bfloat16 keeps 8 bits: both round a sum of size up to ~8 once.
    assert ours.dtype == jnp.bfloat16
    assert_allclose(np.float32(ours), np.float32(plain), atol=8 * 2**-8)


@pytest.mark.parametrize("size", SIZES)
def test_max_pool_and_its_gradient_are_pytorchs_also_for_negative_values(x64, size):
    x = normal(2, *size, 3) - 5  # Padding with zeros would win everywhere.
    ours, pull = jax.vjp(ops.max_pool, x)
    tensor = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    theirs = torch.nn.functional.max_pool2d(tensor, 3, 2, 1)
    assert_allclose(ours, theirs.detach().numpy().transpose(0, 2, 3, 1))
    cotangent = normal(*ours.shape, seed=2)
    theirs.backward(torch.from_numpy(cotangent.transpose(0, 3, 1, 2)))
    assert_allclose(pull(cotangent)[0], tensor.grad.numpy().transpose(0, 2, 3, 1), atol=1e-15)


def test_an_unknown_lowering_is_named():
    with pytest.raises(ValueError, match="'fast'"):
        ops.conv(np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 1, 2), np.float32), groups=2, lowering="fast")
