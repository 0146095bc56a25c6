"""The lowering for CPUs: channels first, images last (CHWN), with gradients of its own.

XLA compiles loops over neighbouring numbers well. In this axis order every operation is such a loop, over whole rows of
pixels of all images: a shift by a pixel moves by N numbers, a stride of 2 skips rows of N, the channels of a unit's
branches lie in one piece, and a 1x1 convolution is one matrix product with its large side contiguous.

The gradients that take longest to trace are under `jax.jit`, so that layers of one shape are traced once.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from . import own_gradients, reference, shuffle
from .windows import largest, taps, weighted_sum

CHANNEL_AXIS = 0
PIXELS = (1, 2, 3)  # The axes H, W and N.
split, join = (partial(function, axis=CHANNEL_AXIS) for function in (shuffle.split, shuffle.join))


def from_nhwc(images):
    """Images (B, H, W, C) as (C, H, W, B)."""
    return jnp.transpose(images, (3, 1, 2, 0))


def to_nhwc(x):
    """Back to (B, H, W, C)."""
    return jnp.transpose(x, (3, 1, 2, 0))


def _apart(function, *arrays):
    """`function(*arrays)` as a loop of its own in the compiled program.

    What follows is often a matrix product, for which XLA would flatten the loop over H, W and N into one and then find
    its way back by a division for each number: three times as slow.
    """
    with set_xla_metadata(inlineable="false"):
        return jax.jit(function)(*arrays)


def per_channel(vector):
    """A value a channel, ready to meet (C, H, W, N)."""
    return vector[:, None, None, None]


def conv(x, kernel, *, stride=1, groups=1):
    """A convolution without bias, padded by (size - 1) / 2 on every side; `reference.conv` in this axis order."""
    size, outputs = kernel.shape[0], kernel.shape[-1]
    x, kernel = own_gradients.prepare((x, kernel))
    if size == 3 and groups == x.shape[0] == outputs:
        return _depthwise(x, kernel[:, :, 0], stride)
    if size == 3 and groups == 1:
        return _stem(x, kernel, stride)
    if size == 1 and groups == 1:
        return _product(kernel[0, 0], x[:, ::stride, ::stride])
    raise ValueError(f"no convolution here for a kernel {kernel.shape} with {groups} groups")


def batch_norm(x, scale, bias, batch_groups, *, epsilon, relu):
    """Batch norm by the statistics of each image's group; `reference.batch_norm` in this axis order."""
    x, scale, bias, batch_groups = own_gradients.prepare((x, scale, bias, batch_groups))
    if batch_groups.single_group:
        y, mean, var = _batch_norm(x, scale, bias, epsilon, relu)
        var = reference.unbiased(var, x.size // x.shape[0])
    else:
        y, means, variances = _grouped_batch_norm(x, scale, bias, batch_groups, epsilon, relu)
        mean, var = means.mean(1), variances.mean(1)
    return y, *lax.stop_gradient((mean, var))


def normalize(x, mean, var, scale, bias, *, epsilon, relu):
    """`reference.normalize` in this axis order."""
    return reference.normalize_by(*map(per_channel, (mean, var, scale, bias)), x, epsilon=epsilon, relu=relu)


@jax.custom_vjp
def max_pool(x):
    """Max pool 3x3 with stride 2, padded by 1 with minus infinity. (C, H, W, N) -> (C, ceil(H/2), ceil(W/2), N)."""
    return _apart(largest, x)


def _max_pool_forward(x):
    highest, place = _apart(_largest_and_place, x)
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
    dy, place = _pad_behind(dy), _pad_behind(place, 255)

    def pixel(row, column, window):
        return jnp.where(window(place) == 3 * row + column, window(dy), 0)

    return (_scatter(pixel, *like.shape[1:]),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def global_mean(x):
    """The mean over all pixels. (C, H, W, N) -> (N, C)."""
    return x.mean((1, 2)).T


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _stem(x, kernel, stride):
    """(I, H, W, N) by (3, 3, I, O) for images, that is for few I: a multiply-add for each tap and input channel.

    Gathering the 27 views for a matrix product would take longer than all of these together.
    """
    return _sum_of_views(x, kernel, stride)


def _sum_of_views(x, kernel, stride):
    return weighted_sum(((view, per_channel(kernel[place])) for place, view in _views(x, stride)), x.dtype)


def _views(x, stride):
    """((row, column, input channel), view (1, H', W', N)) for each tap and channel, in the kernel's order."""
    for row, column, view in taps(x, stride):
        for channel in range(x.shape[0]):
            yield (row, column, channel), view[channel : channel + 1]


def _stem_forward(x, kernel, stride):
    return _stem(x, kernel, stride), (x, kernel)


def _stem_backward(stride, saved, dy):
    x, kernel = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    views = [view.astype(wide) * dy.astype(wide) for _, view in _views(x, stride)]
    dkernel = jnp.stack(_sums(views)).reshape(*kernel.shape).astype(kernel.dtype)
    # The gradient of the images; XLA drops it where nobody asks for it.
    (dx,) = jax.vjp(lambda x: _sum_of_views(x, kernel, stride), x)[1](dy)
    return dx, dkernel


_stem.defvjp(_stem_forward, _stem_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x, kernel, stride):
    """(C, H, W, N) by (3, 3, C): a multiply-add of a shifted view for each tap, in one loop."""
    return _apart(partial(_sum_of_taps, stride=stride), x, kernel)


def _sum_of_taps(x, kernel, stride):
    pairs = ((view, per_channel(kernel[row, column])) for row, column, view in taps(x, stride))
    return weighted_sum(pairs, x.dtype)


def _depthwise_forward(x, kernel, stride):
    return _depthwise(x, kernel, stride), (x, kernel)


@partial(jax.jit, static_argnums=0)
def _depthwise_backward(stride, saved, dy):
    x, kernel = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    products = [view.astype(wide) * dy.astype(wide) for _, _, view in taps(x, stride)]
    dkernel = jnp.stack(_sums(products)).reshape(kernel.shape).astype(kernel.dtype)
    if stride == 1:
        return _depthwise(dy, kernel[::-1, ::-1], 1), dkernel
    padded, weights = _pad_behind(dy.astype(wide)), kernel.astype(wide)

    def pixel(row, column, window):
        return window(padded) * per_channel(weights[row, column])

    return _scatter(pixel, *x.shape[1:3]).astype(x.dtype), dkernel


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@jax.custom_vjp
def _product(weights, x):
    """(I, O) by (I, H, W, N): (O, H, W, N). XLA's own gradients would transpose the large operands first."""
    return _matmul(weights, x, 0).reshape(weights.shape[1], *x.shape[1:])


def _product_forward(weights, x):
    return _product(weights, x), (weights, x)


def _product_backward(saved, dy):
    weights, x = saved
    dweights = lax.dot_general(_rows(x), _rows(dy), (((1,), (1,)), ((), ())))
    return dweights, _matmul(weights, dy, 1).reshape(x.shape)


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(x, scale, bias, epsilon, relu):
    return _batch_norm_forward(x, scale, bias, epsilon, relu)[0]


@partial(jax.jit, static_argnums=(3, 4))
def _batch_norm_forward(x, scale, bias, epsilon, relu):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(PIXELS)
    (squares,) = _sums_of_eighths([jnp.square(wide - per_channel(mean))])
    var = squares / (x.size // x.shape[0])
    y = normalize(x, mean, var, scale, bias, epsilon=epsilon, relu=relu)
    return (y, mean, var), (x, y if relu else None, mean, lax.rsqrt(var + epsilon), scale)


@partial(jax.jit, static_argnums=(0, 1))
def _batch_norm_backward(epsilon, relu, saved, cotangents):
    x, y, mean, inverse, scale = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dy = cotangents[0].astype(wide)
    if relu:
        dy = jnp.where(y > 0, dy, 0)
    # In terms of x, not of the normalised x, which XLA would compute once and store.
    centred, count = x.astype(wide) - per_channel(mean), x.size // x.shape[0]
    dbias, product = _sums_of_eighths([dy, dy * centred])
    slope = product / count * inverse**3 * scale
    dx = (dy - per_channel(dbias / count)) * per_channel(inverse * scale) - centred * per_channel(slope)
    return dx.astype(x.dtype), (product * inverse).astype(scale.dtype), dbias.astype(scale.dtype)


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_batch_norm(x, scale, bias, batch_groups, epsilon, relu):
    """(like x, mean, unbiased variance), the last two (C, N): those of each image's group."""
    return _grouped_batch_norm_forward(x, scale, bias, batch_groups, epsilon, relu)[0]


def _grouped_batch_norm_forward(x, scale, bias, batch_groups, epsilon, relu):
    mean, var, count = batch_groups.moments(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 1)
    vectors = _per_image(mean), _per_image(var), per_channel(scale), per_channel(bias)
    y = reference.normalize_by(*vectors, x, epsilon=epsilon, relu=relu)
    saved = x, y if relu else None, mean, lax.rsqrt(var + epsilon), scale, batch_groups, count
    return (y, mean, reference.unbiased(var, count)), saved


def _grouped_batch_norm_backward(epsilon, relu, saved, cotangents):
    x, y, mean, inverse, scale, batch_groups, count = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dy = cotangents[0].astype(wide)
    if relu:
        dy = jnp.where(y > 0, dy, 0)
    centred = x.astype(wide) - _per_image(mean)
    dbias, product = dy.sum((1, 2)), (dy * centred).sum((1, 2))
    # Padding has no part in the statistics, and so gets nothing back through them.
    share = (1 if batch_groups.mask is None else batch_groups.mask.astype(wide)[None]) / count
    products, levels = batch_groups.totals([product, dbias], 1)
    slope = products * share * inverse**3 * scale[:, None]
    level = levels * share
    dx = (dy - _per_image(level)) * _per_image(inverse * scale[:, None]) - centred * _per_image(slope)
    dscale = (product * inverse).sum(1)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.sum(1).astype(scale.dtype), None


_grouped_batch_norm.defvjp(_grouped_batch_norm_forward, _grouped_batch_norm_backward)


def _per_image(values):
    """A value a channel and image, ready to meet (C, H, W, N)."""
    return values[:, None, None]


def _sums(arrays):
    """The sums over all pixels of several arrays (C, H, W, N), computed in one loop: (C,) each.

    An addition waits for the one before; the more sums a loop has, the more additions are under way at a time.
    """
    zeros = [jnp.zeros((), array.dtype) for array in arrays]
    return lax.reduce(arrays, zeros, lambda a, b: [u + v for u, v in zip(a, b, strict=True)], PIXELS)


def _sums_of_eighths(arrays):
    """The same for one or two arrays: every eighth image has a sum of its own, so that a vector holds them all."""
    ways = math.gcd(arrays[0].shape[-1], 8)
    found = _sums([array[..., way::ways] for array in arrays for way in range(ways)])
    return [sum(found[start : start + ways]) for start in range(0, len(found), ways)]


def _rows(x):
    """(C, H W N): a row a channel."""
    return x.reshape(x.shape[0], -1)


def _matmul(weights, x, axis):
    """The product of a matrix with the rows of x along one of the matrix's axes."""
    return lax.dot_general(weights, _rows(x), (((axis,), (0,)), ((), ())))


def _pad_behind(x, value=0):
    """A pixel more below and to the right."""
    return jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=value)


def _scatter(pixel, height, width):
    """The gradient of taps with stride 2 by the parity of the input's pixels, as loops over neighbouring numbers.

    Args:
      pixel: a function of a tap's row and column and of `window`, which cuts from an array padded below and to the
        right the output pixels that this tap joins to the input's pixels of one parity.
      height, width: of the input.
    """
    height_out, width_out = (height + 1) // 2, (width + 1) // 2
    # Even pixels meet the middle tap of their own output, odd ones the last tap of theirs and the first of the next.
    meets = [[(1, 0)], [(2, 0), (0, 1)]]

    def plane(rows, columns):
        def window(down, right):
            return lambda array: array[:, down : down + height_out, right : right + width_out]

        return sum(pixel(r, c, window(down, right)) for r, down in rows for c, right in columns)

    lines = [jnp.stack([plane(rows, columns) for columns in meets], 3) for rows in meets]
    whole = jnp.stack(lines, 2)  # (C, H', 2, W', 2, N)
    return whole.reshape(whole.shape[0], 2 * height_out, 2 * width_out, -1)[:, :height, :width]
