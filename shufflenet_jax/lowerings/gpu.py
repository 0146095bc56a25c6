"""The lowering for GPUs: NHWC, few kernels, no shuffles, with its own gradients.

The bytes that its kernels touch set the time of a step on a GPU and, in a network as small as this one, so does the
number of kernels. Channels never move: `pieces` follows them through a stage, and the kernel of the convolution that
takes them is permuted instead. Batch norm reads its input once for its statistics and once to normalize, and so does
its gradient.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from ..batch_groups import AXIS, BatchGroups
from ..shapes import Array, Images, Kernel, Vector
from . import own_gradients, reference
from .own_gradients import Saved
from .pieces import Pieces, Places, as_array, as_pieces, is_natural, join, split, take
from .reference import CHANNEL_AXIS, from_nhwc, global_mean
from .windows import largest, taps

Grouped = Float[Array, "groups examples height width channels"]
Window = Callable[[Array, int], Array]

SUMS = 512  # Sums that a GPU takes at a time, for each channel.
NOWHERE = 9  # No tap of a 3x3 window.
LONGEST = 2048  # Numbers of a sum; XLA would divide a longer one again.
LOOP = 16  # Numbers that XLA adds inside another kernel; from 32 on, it would start a new one.

__all__ = ["CHANNEL_AXIS", "from_nhwc", "global_mean", "join", "split"]


def to_nhwc(x: Images | Pieces) -> Images:
    """Return the array (B, H, W, C), with its channels in their own order."""
    return as_array(x)


def conv(
    x: Images | Pieces, kernel: Kernel, *, stride: int = 1, groups: int = 1
) -> Float[Array, "batch rows columns outputs"] | Pieces:
    """Convolve without bias, padded by (size - 1) / 2 on every side, as `reference.conv` does.

    Args:
      x: (B, H, W, I), as an array or Pieces.
      kernel: (size, size, I / groups, O).
      stride: in both directions.
      groups: 1 or I.

    Returns:
      (B, ceil(H / stride), ceil(W / stride), O): Pieces after a depthwise convolution of Pieces, whose channels keep
      their order, else an array.
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


def batch_norm(
    x: Images | Pieces, scale: Vector, bias: Vector, batch_groups: BatchGroups, *, epsilon: float, relu: bool
) -> tuple[Images | Pieces, Vector, Vector]:
    """Normalize by the statistics of each image's group; `reference.batch_norm` in one pass."""
    (array,), (order,) = as_pieces(x).arrays, as_pieces(x).places
    scale, bias = take(scale, order), take(bias, order)
    array, scale, bias, batch_groups = own_gradients.prepare((array, scale, bias, batch_groups))
    y, mean, var = _batch_norm(array, scale, bias, batch_groups, epsilon, relu)
    mean, var = (take(lax.stop_gradient(vector), _inverse(order)) for vector in (mean, var))
    return _like(x, y), mean, var


def normalize(
    x: Images | Pieces, mean: Vector, var: Vector, scale: Vector, bias: Vector, *, epsilon: float, relu: bool
) -> Images | Pieces:
    """Normalize an array or Pieces by given statistics, as `reference.normalize` does."""
    (array,), (order,) = as_pieces(x).arrays, as_pieces(x).places
    vectors = (take(vector, order) for vector in (mean, var, scale, bias))
    return _like(x, reference.normalize(array, *vectors, epsilon=epsilon, relu=relu))


def _like(x: Images | Pieces, array: Images) -> Images | Pieces:
    return Pieces((array,), x.places) if isinstance(x, Pieces) else array


def _inverse(order: Places) -> Places:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _batch_norm(
    x: Images, scale: Vector, bias: Vector, batch_groups: BatchGroups, epsilon: float, relu: bool
) -> tuple[Images, Vector, Vector]:
    return _batch_norm_forward(x, scale, bias, batch_groups, epsilon, relu)[0]


def _batch_norm_forward(
    x: Images, scale: Vector, bias: Vector, batch_groups: BatchGroups, epsilon: float, relu: bool
) -> tuple[tuple[Images, Vector, Vector], Saved]:
    moments = _moments(x, batch_groups)
    factor = lax.rsqrt(moments.var + epsilon) * scale[None]
    mean, var, factor = _at_once(moments.mean, moments.var, factor)
    moments = moments._replace(mean=mean, var=var)
    saved = x, moments, factor, bias, batch_groups
    _, y = _normalized(*saved)
    y = (jax.nn.relu(y) if relu else y).astype(x.dtype).reshape(x.shape)
    mean, var = moments.mean + moments.shift, reference.unbiased(moments.var, moments.size)
    return (y, mean.mean(0), var.mean(0)), saved


def _batch_norm_backward(
    epsilon: float, relu: bool, saved: Saved, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, None]:
    x, moments, factor, bias, batch_groups = saved
    count = moments.size
    moments, factor, bias = _at_once(moments._replace(size=None), factor, bias)

    def inputs(moments: "Moments", factor: Array, bias: Array) -> tuple[Array, Array]:
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
        # In this form the parameters need nothing else from the kernel before.
        dbias, dscale = level, slope * deviation
    # Recompute this from the inputs: XLA would store which numbers were below 0.
    shifted, dy = inputs(moments, factor, bias)
    back = _per_group(constant) + shifted * _per_group(slope)
    if batch_groups.mask is not None:
        # The statistics ignore padding, so it gets no gradient through them.
        back = back * _mask(batch_groups, back)
    dx = ((dy - back) * _per_group(factor)).astype(x.dtype).reshape(x.shape)
    dbias, dscale = ((count * vector).sum(0) for vector in (dbias, dscale))
    return dx, dscale.astype(bias.dtype), dbias.astype(bias.dtype), None


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _at_once(*vectors: object) -> tuple[Any, ...]:
    """Let one kernel compute these vectors; XLA would compute some of them again in the kernels that follow."""
    return lax.optimization_barrier(vectors)


def _normalized(
    x: Images, moments: "Moments", factor: Array, bias: Vector, batch_groups: BatchGroups
) -> tuple[Grouped, Grouped]:
    """Return (x - shift, the result of batch norm), both (groups, examples, H, W, C)."""
    shifted = _grouped(x, batch_groups) - _per_group(moments.shift)
    return shifted, (shifted - _per_group(moments.mean)) * _per_group(factor) + _per_group(bias[None])


def _grouped(x: Images, batch_groups: BatchGroups) -> Grouped:
    """Reshape (B, H, W, C) to (groups, examples, H, W, C), at least in float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide.reshape(-1, batch_groups.size or len(x), *x.shape[1:])


def _per_group(values: Float[Array, "groups channels"]) -> Float[Array, "groups 1 1 1 channels"]:
    """Return one value per group and channel in a shape that broadcasts to (groups, examples, H, W, C)."""
    return values[:, None, None, None]


def _mask(batch_groups: BatchGroups, like: Grouped) -> Float[Array, "groups examples 1 1 1"]:
    return batch_groups.mask.astype(like.dtype).reshape(*like.shape[:2], 1, 1, 1)


class Moments(NamedTuple):
    """Statistics of groups of examples, (groups, C) or (groups, 1).

    Attributes:
      shift: subtracted from all values first.
      mean: of the shifted values.
      var: biased.
      size: number of values behind each; None where it is not needed.
    """

    shift: Array
    mean: Array
    var: Array
    size: Any  # An array or None, which trees of moments replace by placeholders.


def _moments(x: Images, batch_groups: BatchGroups) -> Moments:
    """Take the Moments of (B, H, W, C) in one pass: sums of the values and of their squares.

    Squares lose digits where the mean is large, so one of the values is subtracted first. Values of 16 bits lose more
    digits themselves than float32 sums of their squares do, and for them the subtraction would cost another kernel.
    """
    wide = _grouped(x, batch_groups)
    shape = wide.shape[0], x.shape[-1]
    if batch_groups.spans:
        mean, var, count = batch_groups.moments(wide[0], 0)
        count = (
            jnp.broadcast_to(jnp.asarray(count, wide.dtype), (len(x), 1))[:1]
            if jnp.ndim(count) == 0
            else jnp.asarray(count)[:1]
        )
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


def _sums(arrays: Sequence[Grouped]) -> list[Array]:
    """Sum arrays (groups, examples, H, W, C) over each group's pixels in one pass: (groups, C) each.

    Two kernels run: one takes many sums at a time, and one adds these, into which XLA fuses what follows. XLA's own
    reduction takes one kernel more.
    """
    groups, *pixels, channels = arrays[0].shape
    parts = _parts(groups, math.prod(pixels))
    width = math.gcd(parts, LOOP)
    divided = [array.reshape(groups, parts, -1, channels) for array in arrays]
    zeros = [jnp.zeros((), array.dtype) for array in divided]
    sums = lax.reduce(divided, zeros, lambda a, b: [u + v for u, v in zip(a, b, strict=True)], (2,))
    sums = [array.reshape(groups, -1, width, channels) for array in sums]
    return [sum(array[:, row] for row in range(parts // width)).sum(1) for array in sums]


def _parts(groups: int, pixels: int) -> int:
    """Return how many sums to take at once over a group's pixels: enough to keep a GPU busy, none too long for XLA."""
    parts = 1
    while (groups * parts < SUMS or pixels // parts > LONGEST) and pixels % (2 * parts) == 0:
        parts *= 2
    return parts


@jax.custom_vjp
def max_pool(x: Images) -> Float[Array, "batch rows columns channels"]:
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    return largest(x)


def _max_pool_forward(x: Images) -> tuple[Array, Saved]:
    highest, place = _largest_and_place(x)
    return highest, (place, jnp.zeros((0, *x.shape[1:3])))


def _largest_and_place(x: Images) -> tuple[Array, Array]:
    # The place of the largest value in each window, the first of equals, as in PyTorch: one byte per output.
    highest: Array | None = None
    place: Array | None = None
    for row, column, view in taps(x, 2, -jnp.inf):
        if highest is None or place is None:
            highest, place = view, jnp.zeros(view.shape, jnp.uint8)
        else:
            place = lax.select(view > highest, jnp.full_like(place, 3 * row + column), place)
            highest = lax.max(highest, view)
    assert highest is not None and place is not None  # There are nine taps.
    return highest, place


def _max_pool_backward(saved: Saved, dy: Array) -> tuple[Array]:
    place, like = saved
    taps_met = jnp.arange(9, dtype=jnp.uint8).reshape(3, 3, 1)

    def gradient(tap: Array, window: Window) -> Array:
        return jnp.where(window(place, NOWHERE) == tap, window(dy, 0), 0)

    return (_spread(gradient, _by_parity(taps_met, NOWHERE + 1), *like.shape[1:]),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_vjp
def _depthwise_stride_2(x: Images, kernel: Kernel) -> Float[Array, "batch rows columns channels"]:
    """Convolve as `reference.conv`; XLA's own gradient would first write the output's with zeros between its pixels."""
    return reference.conv(x, kernel, stride=2, groups=x.shape[-1])


def _depthwise_stride_2_forward(x: Images, kernel: Kernel) -> tuple[Array, Saved]:
    return _depthwise_stride_2(x, kernel), (x, kernel)


def _depthwise_stride_2_backward(saved: Saved, dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    (dkernel,) = jax.linear_transpose(lambda k: reference.conv(x, k, stride=2, groups=x.shape[-1]), kernel)(dy)

    def gradient(weight: Array, window: Window) -> Array:
        return weight * window(dy, 0).astype(wide)

    dx = _spread(gradient, _by_parity(kernel[:, :, 0].astype(wide), 0), *x.shape[1:3])
    return dx.astype(x.dtype), dkernel


_depthwise_stride_2.defvjp(_depthwise_stride_2_forward, _depthwise_stride_2_backward)


def _by_parity(taps_met: Array, nothing: int) -> Array:
    """Sort the taps of 3x3 windows with stride 2 by the parity of the pixels that they meet.

    Even pixels meet the middle tap of the window over them; odd ones its last tap, and the first one of the next.

    Args:
      taps_met: (3, 3, C), a value for each tap.
      nothing: value where pixels of a parity do not meet the next window.

    Returns:
      (2, 2, 2, 2, C). The first two axes say whether it is the next window below and to the right, the other two are
      the pixel's parities.
    """
    padded = jnp.pad(taps_met, ((0, 1), (0, 1), (0, 0)), constant_values=nothing)
    met = np.array([[1, 2], [3, 0]])
    return padded[met[:, None, :, None], met[None, :, None, :]]


def _spread(gradient: Callable[[Array, Window], Array], sorted_taps: Array, height: int, width: int) -> Images:
    """Return the gradient of 3x3 windows with stride 2, in one loop over the pixels of their input.

    Args:
      gradient: a function of the taps that pixels meet, and of `window`, which turns an array (B, H', W', C) with a
        value for each window into the values that pixels meet; its second argument fills the border.
      sorted_taps: from `_by_parity`.
      height: of the input.
      width: of the input.
    """
    total: Any = 0
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):

        def window(array: Array, fill: int, down: int = down, right: int = right) -> Array:
            config = ((0, 0, 0), (-down, down, 0), (-right, right, 0), (0, 0, 0))
            return lax.pad(array, jnp.array(fill, array.dtype), config)[:, :, None, :, None]

        total += gradient(sorted_taps[down, right][None, None, :, None], window)
    batch, rows, _, columns, _, channels = total.shape
    return total.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]
