"""The lowering for CPUs: channels first, images last (CHWN), with its own gradients.

XLA compiles loops over neighboring numbers well. In this axis order every operation is a loop over whole rows of pixels
of all images: a shift by a pixel moves by N numbers, a stride of 2 skips rows of N, the channels of a unit's branches
are contiguous, and a 1x1 convolution is one matrix product with its large side contiguous.

The gradients that take longest to trace are under `jax.jit`, so that layers of one shape are traced once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Float

from ..batch_groups import BatchGroups
from ..shapes import Array, Images, Kernel, Vector
from . import own_gradients, reference, shuffle
from .own_gradients import Saved
from .windows import largest, taps, weighted_sum

Planes = Float[Array, "channels height width batch"]
Window = Callable[[Array], Array]
Result = TypeVar("Result")
Normalized = tuple[Array, Array, Array]  # The normalized images, their means and their variances.

CHANNEL_AXIS = 0
PIXELS = (1, 2, 3)  # The axes H, W and N.
split, join = (partial(function, axis=CHANNEL_AXIS) for function in (shuffle.split, shuffle.join))


def from_nhwc(images: Images) -> Planes:
    """Transpose images (B, H, W, C) to (C, H, W, B)."""
    return jnp.transpose(images, (3, 1, 2, 0))


def to_nhwc(x: Planes) -> Images:
    """Transpose (C, H, W, B) back to (B, H, W, C)."""
    return jnp.transpose(x, (3, 1, 2, 0))


def _as_own_loop(function: Callable[..., Result], *arrays: Array) -> Result:
    """Call a function on arrays as a separate loop of the compiled program.

    Often a matrix product follows, for which XLA would flatten the loop over H, W and N into one and then recover these
    by a division for each number: three times as slow.
    """
    with set_xla_metadata(inlineable="false"):
        return jax.jit(function)(*arrays)


def per_channel(vector: Vector) -> Float[Array, "channels 1 1 1"]:
    """Return one value per channel in a shape that broadcasts to (C, H, W, N)."""
    return vector[:, None, None, None]


def conv(x: Planes, kernel: Kernel, *, stride: int = 1, groups: int = 1) -> Float[Array, "outputs rows columns batch"]:
    """Convolve without bias, padded by (size - 1) / 2 on every side; `reference.conv` in this axis order.

    Args:
      x: (I, H, W, N).
      kernel: (size, size, I / groups, O); size is 1 or 3.
      stride: in both directions.
      groups: 1, or I for a depthwise convolution with O = I.

    Raises:
      ValueError: the network has no convolution of this kind.
    """
    size, outputs = kernel.shape[0], kernel.shape[-1]
    x, kernel = own_gradients.prepare((x, kernel))
    if size == 3 and groups == x.shape[0] == outputs:
        return _depthwise(x, kernel[:, :, 0], stride)
    if size == 3 and groups == 1:
        return _stem(x, kernel, stride)
    if size == 1 and groups == 1:
        return _product(kernel[0, 0], x[:, ::stride, ::stride])
    raise ValueError(f"no convolution here for a kernel {kernel.shape} with {groups} groups")


def batch_norm(
    x: Planes, scale: Vector, bias: Vector, batch_groups: BatchGroups, *, epsilon: float, relu: bool
) -> tuple[Planes, Vector, Vector]:
    """Normalize by the statistics of each image's group; `reference.batch_norm` in this axis order."""
    x, scale, bias, batch_groups = own_gradients.prepare((x, scale, bias, batch_groups))
    if batch_groups.single_group:
        y, mean, var = _batch_norm(x, scale, bias, epsilon, relu)
        var = reference.unbiased(var, x.size // x.shape[0])
    else:
        y, means, variances = _grouped_batch_norm(x, scale, bias, batch_groups, epsilon, relu)
        mean, var = means.mean(1), variances.mean(1)
    return y, *lax.stop_gradient((mean, var))


def normalize(
    x: Planes, mean: Vector, var: Vector, scale: Vector, bias: Vector, *, epsilon: float, relu: bool
) -> Planes:
    """Normalize by given statistics; `reference.normalize` in this axis order."""
    vectors = per_channel(mean), per_channel(var), per_channel(scale), per_channel(bias)
    return reference.normalize_by(*vectors, x, epsilon=epsilon, relu=relu)


@jax.custom_vjp
def max_pool(x: Planes) -> Float[Array, "channels rows columns batch"]:
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (C, H, W, N) -> (C, ceil(H/2), ceil(W/2), N)."""
    return _as_own_loop(largest, x)


def _max_pool_forward(x: Planes) -> tuple[Array, Saved]:
    highest, place = _as_own_loop(_largest_and_place, x)
    return highest, (place, jnp.zeros((0, *x.shape[1:3])))


def _largest_and_place(x: Planes) -> tuple[Array, Array]:
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
    dy, place = _pad_behind(dy), _pad_behind(place, 255)

    def pixel(row: int, column: int, window: Window) -> Array:
        return jnp.where(window(place) == 3 * row + column, window(dy), 0)

    return (_scatter(pixel, *like.shape[1:]),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def global_mean(x: Planes) -> Float[Array, "batch channels"]:
    """Return the mean over all pixels. (C, H, W, N) -> (N, C)."""
    return x.mean((1, 2)).T


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _stem(x: Planes, kernel: Kernel, stride: int) -> Array:
    """Convolve (I, H, W, N) by (3, 3, I, O) for few I, as images have: a multiply-add for each tap and input channel.

    Gathering the 27 views for a matrix product would take longer than all of these together.
    """
    return _sum_of_views(x, kernel, stride)


def _sum_of_views(x: Planes, kernel: Kernel, stride: int) -> Array:
    return weighted_sum(((view, per_channel(kernel[place])) for place, view in _views(x, stride)), x.dtype)


def _views(x: Planes, stride: int) -> Iterator[tuple[tuple[int, int, int], Array]]:
    """Yield ((row, column, input channel), view (1, H', W', N)) for each tap and channel, in the kernel's order."""
    for row, column, view in taps(x, stride):
        for channel in range(x.shape[0]):
            yield (row, column, channel), view[channel : channel + 1]


def _stem_forward(x: Planes, kernel: Kernel, stride: int) -> tuple[Array, Saved]:
    return _stem(x, kernel, stride), (x, kernel)


def _stem_backward(stride: int, saved: Saved, dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    views = [view.astype(wide) * dy.astype(wide) for _, view in _views(x, stride)]
    dkernel = jnp.stack(_sums(views)).reshape(*kernel.shape).astype(kernel.dtype)
    # The gradient of the images; XLA drops it where nothing uses it.
    (dx,) = jax.vjp(lambda x: _sum_of_views(x, kernel, stride), x)[1](dy)
    return dx, dkernel


_stem.defvjp(_stem_forward, _stem_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: Planes, kernel: Float[Array, "3 3 channels"], stride: int) -> Array:
    """Convolve (C, H, W, N) by (3, 3, C): a multiply-add of a shifted view for each tap, in one loop."""
    return _as_own_loop(partial(_sum_of_taps, stride=stride), x, kernel)


def _sum_of_taps(x: Planes, kernel: Float[Array, "3 3 channels"], stride: int) -> Array:
    pairs = ((view, per_channel(kernel[row, column])) for row, column, view in taps(x, stride))
    return weighted_sum(pairs, x.dtype)


def _depthwise_forward(x: Planes, kernel: Float[Array, "3 3 channels"], stride: int) -> tuple[Array, Saved]:
    return _depthwise(x, kernel, stride), (x, kernel)


@partial(jax.jit, static_argnums=0)
def _depthwise_backward(stride: int, saved: Saved, dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    products = [view.astype(wide) * dy.astype(wide) for _, _, view in taps(x, stride)]
    dkernel = jnp.stack(_sums(products)).reshape(kernel.shape).astype(kernel.dtype)
    if stride == 1:
        return _depthwise(dy, kernel[::-1, ::-1], 1), dkernel
    padded, weights = _pad_behind(dy.astype(wide)), kernel.astype(wide)

    def pixel(row: int, column: int, window: Window) -> Array:
        return window(padded) * per_channel(weights[row, column])

    return _scatter(pixel, *x.shape[1:3]).astype(x.dtype), dkernel


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@jax.custom_vjp
def _product(
    weights: Float[Array, "inputs outputs"], x: Float[Array, "inputs height width batch"]
) -> Float[Array, "outputs height width batch"]:
    """Multiply (I, O) by (I, H, W, N) to (O, H, W, N). XLA's own gradients would transpose the large operands first."""
    return _matmul(weights, x, 0).reshape(weights.shape[1], *x.shape[1:])


def _product_forward(weights: Array, x: Array) -> tuple[Array, Saved]:
    return _product(weights, x), (weights, x)


def _product_backward(saved: Saved, dy: Array) -> tuple[Array, Array]:
    weights, x = saved
    dweights = lax.dot_general(_rows(x), _rows(dy), (((1,), (1,)), ((), ())))
    return dweights, _matmul(weights, dy, 1).reshape(x.shape)


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(x: Planes, scale: Vector, bias: Vector, epsilon: float, relu: bool) -> Normalized:
    return _batch_norm_forward(x, scale, bias, epsilon, relu)[0]


@partial(jax.jit, static_argnums=(3, 4))
def _batch_norm_forward(x: Planes, scale: Vector, bias: Vector, epsilon: float, relu: bool) -> tuple[Normalized, Saved]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(PIXELS)
    (squares,) = _sums_of_eighths([jnp.square(wide - per_channel(mean))])
    var = squares / (x.size // x.shape[0])
    y = normalize(x, mean, var, scale, bias, epsilon=epsilon, relu=relu)
    return (y, mean, var), (x, y if relu else None, mean, lax.rsqrt(var + epsilon), scale)


@partial(jax.jit, static_argnums=(0, 1))
def _batch_norm_backward(
    _epsilon: float, relu: bool, saved: Saved, cotangents: Normalized
) -> tuple[Array, Array, Array]:
    x, y, mean, inverse, scale = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dy = cotangents[0].astype(wide)
    if relu:
        dy = jnp.where(y > 0, dy, 0)
    # In terms of x, not of the normalized x, which XLA would compute once and store.
    centered, count = x.astype(wide) - per_channel(mean), x.size // x.shape[0]
    dbias, product = _sums_of_eighths([dy, dy * centered])
    slope = product / count * inverse**3 * scale
    dx = (dy - per_channel(dbias / count)) * per_channel(inverse * scale) - centered * per_channel(slope)
    return dx.astype(x.dtype), (product * inverse).astype(scale.dtype), dbias.astype(scale.dtype)


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_batch_norm(
    x: Planes, scale: Vector, bias: Vector, batch_groups: BatchGroups, epsilon: float, relu: bool
) -> Normalized:
    """Return (like x, mean, unbiased variance); the last two, (C, N), are those of each image's group."""
    return _grouped_batch_norm_forward(x, scale, bias, batch_groups, epsilon, relu)[0]


def _grouped_batch_norm_forward(
    x: Planes, scale: Vector, bias: Vector, batch_groups: BatchGroups, epsilon: float, relu: bool
) -> tuple[Normalized, Saved]:
    mean, var, count = batch_groups.moments(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 1)
    vectors = _per_image(mean), _per_image(var), per_channel(scale), per_channel(bias)
    y = reference.normalize_by(*vectors, x, epsilon=epsilon, relu=relu)
    saved = x, y if relu else None, mean, lax.rsqrt(var + epsilon), scale, batch_groups, count
    return (y, mean, reference.unbiased(var, count)), saved


def _grouped_batch_norm_backward(
    _epsilon: float, relu: bool, saved: Saved, cotangents: Normalized
) -> tuple[Array, Array, Array, None]:
    x, y, mean, inverse, scale, batch_groups, count = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dy = cotangents[0].astype(wide)
    if relu:
        dy = jnp.where(y > 0, dy, 0)
    centered = x.astype(wide) - _per_image(mean)
    dbias, product = dy.sum((1, 2)), (dy * centered).sum((1, 2))
    # The statistics ignore padding, so it gets no gradient through them.
    share = (1 if batch_groups.mask is None else batch_groups.mask.astype(wide)[None]) / count
    products, levels = batch_groups.totals([product, dbias], 1)
    slope = products * share * inverse**3 * scale[:, None]
    level = levels * share
    dx = (dy - _per_image(level)) * _per_image(inverse * scale[:, None]) - centered * _per_image(slope)
    dscale = (product * inverse).sum(1)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.sum(1).astype(scale.dtype), None


_grouped_batch_norm.defvjp(_grouped_batch_norm_forward, _grouped_batch_norm_backward)


def _per_image(values: Float[Array, "channels batch"]) -> Float[Array, "channels 1 1 batch"]:
    """Return one value per channel and image in a shape that broadcasts to (C, H, W, N)."""
    return values[:, None, None]


def _sums(arrays: Sequence[Array]) -> Sequence[Array]:
    """Sum several arrays (C, H, W, N) over all pixels in one loop: (C,) each.

    An addition waits for the one before. The more sums a loop has, the more additions overlap.
    """
    zeros = [jnp.zeros((), array.dtype) for array in arrays]
    return lax.reduce(arrays, zeros, lambda a, b: [u + v for u, v in zip(a, b, strict=True)], PIXELS)


def _sums_of_eighths(arrays: Sequence[Array]) -> list[Array]:
    """Do the same for one or two arrays: every eighth image has its own sum, so that a vector holds them all."""
    ways = math.gcd(arrays[0].shape[-1], 8)
    parts = _sums([array[..., way::ways] for array in arrays for way in range(ways)])
    return [sum(parts[start : start + ways]) for start in range(0, len(parts), ways)]


def _rows(x: Planes) -> Float[Array, "channels pixels"]:
    """Reshape (C, H, W, N) to one row per channel, (C, H W N)."""
    return x.reshape(x.shape[0], -1)


def _matmul(weights: Float[Array, "inputs outputs"], x: Planes, axis: int) -> Array:
    """Multiply a matrix, along one of its axes, by the rows of x."""
    return lax.dot_general(weights, _rows(x), (((axis,), (0,)), ((), ())))


def _pad_behind(x: Array, value: int = 0) -> Array:
    """Pad by one pixel below and to the right."""
    return jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=value)


def _scatter(pixel: Callable[[int, int, Window], Array], height: int, width: int) -> Array:
    """Return the gradient of taps with stride 2, by the parity of the input's pixels, as loops over neighbors.

    Args:
      pixel: a function of a tap's row and column and of `window`, which cuts from an array padded below and to the
        right the output pixels that this tap joins to the input's pixels of one parity.
      height: of the input.
      width: of the input.

    Returns:
      (C, height, width, N).
    """
    height_out, width_out = (height + 1) // 2, (width + 1) // 2
    # Even pixels meet the middle tap of their own output, odd ones the last tap of theirs and the first of the next.
    meets = [[(1, 0)], [(2, 0), (0, 1)]]

    def plane(rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> Array:
        def window(down: int, right: int) -> Window:
            return lambda array: array[:, down : down + height_out, right : right + width_out]

        return sum(pixel(r, c, window(down, right)) for r, down in rows for c, right in columns)

    lines = [jnp.stack([plane(rows, columns) for columns in meets], 3) for rows in meets]
    joined = jnp.stack(lines, 2)  # (C, H', 2, W', 2, N)
    return joined.reshape(joined.shape[0], 2 * height_out, 2 * width_out, -1)[:, :height, :width]
