"""State, schedule, optimiser, loss and one step of training: pure functions of one device.

The update is PyTorch's SGD: L2 is added to the gradient before momentum.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from .data import transforms
from .evaluation import label_ranks
from .model import init_variables
from .rows import AXIS


class State(train_state.TrainState):
    """Everything that the next step depends on: step, params, opt_state and batch_stats."""

    batch_stats: Any

    @property
    def variables(self):
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def optimizer(self):
        return {"step": self.step, "opt_state": self.opt_state}


def create_state(module, optimizer, variables):
    """The state before the first step, from a network's {"params", "batch_stats"}."""
    return State.create(
        apply_fn=module.apply, tx=optimizer, params=variables["params"], batch_stats=variables["batch_stats"]
    ).replace(step=jnp.zeros((), jnp.int32))


def init_state(module, config, total_steps):
    """The state at the beginning of a run, from the seed of its TrainConfig."""
    return create_state(module, make_optimizer(config, total_steps), init_variables(module, seed=config.seed))


def make_schedule(config, total_steps):
    """The learning rate of step t = 0 .. total_steps - 1: a pure function, a tenth of the schedule's during warm-up."""
    left = {
        # Written so, it stays exact in float32.
        "linear": lambda step: config.learning_rate * (total_steps - step) / total_steps,
        "cosine": lambda step: config.learning_rate * (1 + jnp.cos(math.pi * step / total_steps)) / 2,
        "constant": lambda step: config.learning_rate,
    }[config.schedule]
    return lambda step: left(step) * jnp.where(step < config.warmup_steps, 0.1, 1.0)


def make_optimizer(config, total_steps):
    """SGD with momentum and coupled L2, the way PyTorch computes them; clipping, where asked for, comes first."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        optax.add_decayed_weights(config.weight_decay, lambda params: decays(params, config.decay)),
        optax.sgd(make_schedule(config, total_steps), momentum=config.momentum, nesterov=config.nesterov),
    )


def decays(params, which="no_norm"):
    """A tree of booleans: whether L2 applies, by a TrainConfig's `decay`."""

    def applies(path, leaf):
        if which == "matrices":
            return leaf.ndim > 1
        return which == "all" or all(entry.key != "bn" for entry in path)

    return jax.tree.map_with_path(applies, params)


def decay_table(params, which):
    """Which parameters decay, in lines: kind, tensors, numbers, and whether L2 applies."""
    kinds = {}
    flags = jax.tree.leaves(decays(params, which))
    for (path, leaf), applies in zip(jax.tree.leaves_with_path(params), flags, strict=True):
        *above, layer, name = (entry.key for entry in path)
        depthwise = layer == "conv" and above[-1].endswith("_dw")
        kind = f"{'depthwise ' if depthwise else ''}{layer}/{name}"
        tensors, numbers, _ = kinds.get(kind, (0, 0, applies))
        kinds[kind] = tensors + 1, numbers + leaf.size, applies
    rows = [f"{'parameters':24}{'tensors':>8}{'numbers':>12}  weight decay"]
    rows += [f"{kind:24}{n:8}{size:12,}  {'yes' if on else 'no'}" for kind, (n, size, on) in kinds.items()]
    return "\n".join(rows)


def train_step(module, config, layout, state, batch):
    """One SGD step on this device's share of the batch; the gradient is that of the mean over all images.

    Args:
      module: a ShuffleNetV2 with a classifier.
      config: a TrainConfig: how the uint8 images are normalised, the loss, and the seed of dropout.
      layout: a Layout: the batch's parts, and which images share batch statistics.
      state: a State.
      batch: {"images": uint8 (parts, R, H, W, C), "labels": (parts, R)}, in the last batch of an epoch "mask": (parts,
        R), 0 for padding, and "flip", "erase" as in `transforms.network_inputs`.
    Returns:
      The next State, and the batch's {"loss", "top1", "top5", "grad_norm"}, top1 and top5 in percent.
    """
    place = jax.lax.axis_index(AXIS)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), place)
    images = jax.lax.psum(batch["mask"].sum(), AXIS) if "mask" in batch else layout.batch_size

    def loss_fn(params, part, number):
        inputs = transforms.network_inputs(part, config.preprocess, module.dtype)
        (logits, _), updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            inputs,
            train=True,
            rows=layout.rows_of(part.get("mask")),
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, number)},
        )
        losses = cross_entropy(logits, part["labels"], config.label_smoothing)
        ranks = label_ranks(logits, part["labels"])
        figures = {"loss": losses, "top1": 100.0 * (ranks < 1), "top5": 100.0 * (ranks < 5)}
        if "mask" in part:
            figures = {name: jnp.where(part["mask"] > 0, column, 0) for name, column in figures.items()}
        sums = {name: column.sum() / images for name, column in figures.items()}
        # The statistics move by the mean over all groups: every part and device has equally many.
        statistics = jax.tree.map(lambda leaf: leaf / layout.parts, updates["batch_stats"])
        return sums["loss"], (statistics, sums)

    def one_part(number):
        part = {name: column[number] for name, column in batch.items()}
        (_, (statistics, sums)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, part, number)
        return grads, statistics, sums

    if layout.parts == 1:
        found = one_part(0)
    else:
        shapes = jax.eval_shape(one_part, 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        found = jax.lax.fori_loop(
            0, layout.parts, lambda number, total: jax.tree.map(jnp.add, total, one_part(number)), zeros
        )
    grads, statistics, sums = found
    # Groups keep their own batch statistics, as PyTorch DDP does; only the running averages are shared.
    grads, sums = jax.lax.psum((grads, sums), AXIS)
    statistics = jax.lax.pmean(statistics, AXIS)
    # XLA's CPU maximum drops NaN, so that a loss can look sound when the gradient no longer is.
    metrics = {**sums, "grad_norm": optax.tree.norm(grads)}
    return state.apply_gradients(grads=grads, batch_stats=statistics), metrics


def cross_entropy(logits, labels, smoothing=0.0):
    """The loss of each image, (B,), with PyTorch's label smoothing: (1 - s) at the label, and s / C at every class."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing:
        evenly = -jax.nn.log_softmax(logits).mean(1)
        losses = (1 - smoothing) * losses + smoothing * evenly
    return losses
