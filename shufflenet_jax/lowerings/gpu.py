"""The lowering for GPUs: NHWC, few kernels, no shuffles, with gradients of its own.

A step on a GPU is as long as the bytes that its kernels touch and, for a network as small as this one, as their number.
Channels are never moved: `pieces` follows them through a stage, and the kernel of the convolution that takes them is
permuted instead. Batch norm reads its input once for its statistics and once to normalize, and so does its gradient.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..batch_groups import AXIS
from . import own_gradients, reference
from .pieces import Pieces, as_array, as_pieces, is_natural, join, split, take
from .reference import CHANNEL_AXIS, from_nhwc, global_mean
from .windows import largest, taps

SUMS = 512  # That a GPU takes at a time, for each channel.
NOWHERE = 9  # No tap of a 3x3 window.
LONGEST = 2048  # Numbers of a sum; XLA would divide a longer one again.
LOOP = 16  # Numbers that XLA adds inside another kernel; from 32 on, it would take one of its own.

__all__ = ["CHANNEL_AXIS", "from_nhwc", "global_mean", "join", "split"]


def to_nhwc(x):
    """Back to (B, H, W, C)."""
    return as_array(x)


def conv(x, kernel, *, stride=1, groups=1):
    """A convolution without bias, padded by (size - 1) / 2 on every side; `reference.conv` in all but speed.

    It takes an array or Pieces, and returns the channels of a depthwise convolution in the order in which they came.
    """
    pieces = as_pieces(x)
    x, order = pieces.joined(), pieces.order
    kernel = take(kernel, order, 2 if groups == 1 else 3)
    if kernel.shape[:2] == (1, 1) and groups == 1:
        return lax.dot_general(x[:, ::stride, ::stride], kernel[0, 0], (((3,), (0,)), ((), ())))
    if stride == 2 and kernel.shape == (3, 3, 1, groups):
        y = _depthwise_stride_2(*own_gradients.prepare((x, kernel)))
    else:
        y = reference.conv(x, kernel, stride=stride, groups=groups)
    return y if groups == 1 or is_natural(order) else Pieces((y,), (order,))


def batch_norm(x, scale, bias, batch_groups, *, epsilon, relu):
    """Batch norm by the statistics of each image's group; `reference.batch_norm` in one pass."""
    (array,), (order,) = as_pieces(x).arrays, as_pieces(x).places
    scale, bias = take(scale, order), take(bias, order)
    array, scale, bias, batch_groups = own_gradients.prepare((array, scale, bias, batch_groups))
    y, mean, var = _batch_norm(array, scale, bias, batch_groups, epsilon, relu)
    mean, var = (take(lax.stop_gradient(vector), _inverse(order)) for vector in (mean, var))
    return _like(x, y), mean, var


def normalize(x, mean, var, scale, bias, *, epsilon, relu):
    """`reference.normalize` of an array or Pieces."""
    (array,), (order,) = as_pieces(x).arrays, as_pieces(x).places
    vectors = (take(vector, order) for vector in (mean, var, scale, bias))
    return _like(x, reference.normalize(array, *vectors, epsilon=epsilon, relu=relu))


def _like(x, array):
    return Pieces((array,), x.places) if isinstance(x, Pieces) else array


def _inverse(order):
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _batch_norm(x, scale, bias, batch_groups, epsilon, relu):
    return _batch_norm_forward(x, scale, bias, batch_groups, epsilon, relu)[0]


def _batch_norm_forward(x, scale, bias, batch_groups, epsilon, relu):
    moments = _moments(x, batch_groups)
    factor = lax.rsqrt(moments.var + epsilon) * scale[None]
    mean, var, factor = _at_once(moments.mean, moments.var, factor)
    moments = moments._replace(mean=mean, var=var)
    saved = x, moments, factor, bias, batch_groups
    _, y = _normalized(*saved)
    y = (jax.nn.relu(y) if relu else y).astype(x.dtype).reshape(x.shape)
    mean, var = moments.mean + moments.shift, reference.unbiased(moments.var, moments.size)
    return (y, mean.mean(0), var.mean(0)), saved


def _batch_norm_backward(epsilon, relu, saved, cotangents):
    x, moments, factor, bias, batch_groups = saved
    count = moments.size
    moments, factor, bias = _at_once(moments._replace(size=None), factor, bias)

    def inputs(moments, factor, bias):
        shifted, y = _normalized(x, moments, factor, bias, batch_groups)
        dy = _grouped(cotangents[0], batch_groups)
        return shifted, jnp.where(y > 0, dy, 0) if relu else dy

    shifted, dy = inputs(moments, factor, bias)
    weighted = dy * _per_group(1 / count)
    level, product = _sums([weighted, weighted * (shifted - _per_group(moments.mean))])
    deviation = jnp.sqrt(moments.var + epsilon)
    dbias, dscale = level, product / deviation
    if batch_groups.spans:
        level, product = lax.psum(jnp.stack([level, product]), AXIS, axis_index_groups=batch_groups.spans)
    slope = product / jnp.square(deviation)
    constant, slope, level, moments, factor, bias = _at_once(
        level - moments.mean * slope, slope, level, moments, factor, bias
    )
    if not batch_groups.spans:
        # Put like this, the parameters need nothing else from the kernel before.
        dbias, dscale = level, slope * deviation
    # Again from the inputs: XLA would write out which numbers were below 0.
    shifted, dy = inputs(moments, factor, bias)
    back = _per_group(constant) + shifted * _per_group(slope)
    if batch_groups.mask is not None:
        # Padding has no part in the statistics, and so gets nothing back through them.
        back = back * _mask(batch_groups, back)
    dx = ((dy - back) * _per_group(factor)).astype(x.dtype).reshape(x.shape)
    dbias, dscale = ((count * vector).sum(0) for vector in (dbias, dscale))
    return dx, dscale.astype(bias.dtype), dbias.astype(bias.dtype), None


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _at_once(*vectors):
    """The same vectors, which one kernel computes; XLA would take some of them apart to join them to what follows."""
    return lax.optimization_barrier(vectors)


def _normalized(x, moments, factor, bias, batch_groups):
    """(x - shift, the result of batch norm), both (groups, examples, H, W, C)."""
    shifted = _grouped(x, batch_groups) - _per_group(moments.shift)
    return shifted, (shifted - _per_group(moments.mean)) * _per_group(factor) + _per_group(bias[None])


def _grouped(x, batch_groups):
    """(B, H, W, C) as (groups, examples, H, W, C), at least in float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide.reshape(-1, batch_groups.size or len(x), *x.shape[1:])


def _per_group(values):
    """A value a group and channel, ready to meet (groups, examples, H, W, C)."""
    return values[:, None, None, None]


def _mask(batch_groups, like):
    return batch_groups.mask.astype(like.dtype).reshape(*like.shape[:2], 1, 1, 1)


class Moments(NamedTuple):
    """Statistics of groups of examples, (groups, C) or (groups, 1).

    Attributes:
      shift: what all values were reduced by first.
      mean: of the values so shifted.
      var: biased.
      size: number of values that each is taken over; None where it is not needed.
    """

    shift: jax.Array
    mean: jax.Array
    var: jax.Array
    size: jax.Array | None


def _moments(x, batch_groups):
    """Take the Moments of (B, H, W, C) in one pass: sums of the values and of their squares.

    Squares lose digits where the mean is large, so that one of the values is subtracted first. Values of 16 bits lose
    more there than float32 sums of their squares do, and for them it would be a kernel more.
    """
    wide = _grouped(x, batch_groups)
    shape = wide.shape[0], x.shape[-1]
    if batch_groups.spans:
        mean, var, count = batch_groups.moments(wide[0], 0)
        count = jnp.broadcast_to(jnp.asarray(count, wide.dtype), (len(x), 1))[:1] if jnp.ndim(count) == 0 else count[:1]
        return Moments(mean[:1], jnp.zeros(shape, wide.dtype), var[:1], count)
    shift = jnp.zeros(shape, wide.dtype) if x.dtype.itemsize < 4 else wide[:, 0, 0, 0]
    count = jnp.full((shape[0], 1), x.size // shape[0] // shape[1], wide.dtype)
    shifted = wide - _per_group(shift)
    if batch_groups.mask is not None:
        mask = _mask(batch_groups, wide)
        shifted, count = shifted * mask, mask.sum((1, 2, 3)) * (x.shape[1] * x.shape[2])
    weighted = shifted * _per_group(1 / count)
    mean, squares = _sums([weighted, weighted * shifted])
    return Moments(shift, mean, jnp.maximum(squares - jnp.square(mean), 0), count)


def _sums(arrays):
    """The sums (groups, C) over each group's pixels of arrays (groups, examples, H, W, C), in one pass.

    Two kernels: one takes many sums at a time, and one adds these, to which XLA joins what follows. Left to itself XLA
    takes one more.
    """
    groups, *pixels, channels = arrays[0].shape
    parts = _parts(groups, math.prod(pixels))
    width = math.gcd(parts, LOOP)
    arrays = [array.reshape(groups, parts, -1, channels) for array in arrays]
    zeros = [jnp.zeros((), array.dtype) for array in arrays]
    found = lax.reduce(arrays, zeros, lambda a, b: [u + v for u, v in zip(a, b, strict=True)], (2,))
    found = [array.reshape(groups, -1, width, channels) for array in found]
    return [sum(array[:, row] for row in range(parts // width)).sum(1) for array in found]


def _parts(groups, pixels):
    """How many sums to take at a time over a group's pixels: enough to keep a GPU busy, and none too long for XLA."""
    parts = 1
    while (groups * parts < SUMS or pixels // parts > LONGEST) and pixels % (2 * parts) == 0:
        parts *= 2
    return parts


@jax.custom_vjp
def max_pool(x):
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    return largest(x)


def _max_pool_forward(x):
    highest, place = _largest_and_place(x)
    return highest, (place, jnp.zeros((0, *x.shape[1:3])))


def _largest_and_place(x):
    # The place of the largest value in each window, the first of equals, as in PyTorch: a byte an output.
    highest = place = None
    for row, column, view in taps(x, 2, -jnp.inf):
        if place is None:
            highest, place = view, jnp.zeros(view.shape, jnp.uint8)
        else:
            place = lax.select(view > highest, jnp.full_like(place, 3 * row + column), place)
            highest = lax.max(highest, view)
    return highest, place


def _max_pool_backward(saved, dy):
    place, like = saved
    taps_met = jnp.arange(9, dtype=jnp.uint8).reshape(3, 3, 1)

    def gradient(tap, window):
        return jnp.where(window(place, NOWHERE) == tap, window(dy, 0), 0)

    return (_spread(gradient, _by_parity(taps_met, NOWHERE + 1), *like.shape[1:]),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_vjp
def _depthwise_stride_2(x, kernel):
    """`reference.conv`; XLA's own gradient would first write the output's with zeros between its pixels."""
    return reference.conv(x, kernel, stride=2, groups=x.shape[-1])


def _depthwise_stride_2_forward(x, kernel):
    return _depthwise_stride_2(x, kernel), (x, kernel)


def _depthwise_stride_2_backward(saved, dy):
    x, kernel = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    (dkernel,) = jax.linear_transpose(lambda k: reference.conv(x, k, stride=2, groups=x.shape[-1]), kernel)(dy)

    def gradient(weight, window):
        return weight * window(dy, 0).astype(wide)

    dx = _spread(gradient, _by_parity(kernel[:, :, 0].astype(wide), 0), *x.shape[1:3])
    return dx.astype(x.dtype), dkernel


_depthwise_stride_2.defvjp(_depthwise_stride_2_forward, _depthwise_stride_2_backward)


def _by_parity(taps_met, nothing):
    """Sort what belongs to the taps of 3x3 windows with stride 2 by the parity of the pixels that they meet.

    Even pixels meet the middle tap of the window over them; odd ones its last tap, and the first one of the next.

    Args:
      taps_met: (3, 3, C).
      nothing: what to put where pixels of a parity do not meet the next window.
    Returns:
      (2, 2, 2, 2, C): whether the next window below and to the right; then the pixel's parities.
    """
    padded = jnp.pad(taps_met, ((0, 1), (0, 1), (0, 0)), constant_values=nothing)
    met = np.array([[1, 2], [3, 0]])
    return padded[met[:, None, :, None], met[None, :, None, :]]


def _spread(gradient, sorted_taps, height, width):
    """The gradient of 3x3 windows with stride 2, in one loop over the pixels of their input.

    Args:
      gradient: a function of what `_by_parity` sorted and of `window`, which for an array (B, H', W', C) of the windows
        and what to fill it up with gives what each pixel meets.
      sorted_taps: from `_by_parity`.
      height, width: of the input.
    """
    total = 0
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):

        def window(array, fill, down=down, right=right):
            config = ((0, 0, 0), (-down, down, 0), (-right, right, 0), (0, 0, 0))
            return lax.pad(array, jnp.array(fill, array.dtype), config)[:, :, None, :, None]

        total += gradient(sorted_taps[down, right][None, None, :, None], window)
    batch, rows, _, columns, _, channels = total.shape
    return total.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]
