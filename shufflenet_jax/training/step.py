"""One step of training: pure functions of one device."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..batch_groups import AXIS
from ..config import Preprocess
from ..data import mixing, normalization
from ..evaluation.ranking import label_ranks
from .averages import average_weights, recalibrate
from .losses import Targets, image_losses
from .optimizer import is_frozen
from .packing import UNPACKED
from .schedule import count_steps


class Teacher(NamedTuple):
    """A network whose predictions another one learns; its weights are an argument of the step."""

    module: Any  # `apply(weights, images)` returns (logits, features).
    preprocess: Preprocess


class Constants(NamedTuple):
    """Arrays that steps read and never change."""

    class_weights: Any = None  # (num_classes,), or None.
    teacher: Any = None  # The weights of the teacher, or None.


def train_step(module, config, epoch, state, batch, constants, *, teacher=None, packing=UNPACKED):
    """Take one SGD step on this device's share of the batch; the gradient is that of the mean over all images.

    Args:
      module: a ShuffleNetV2 with a classifier.
      config: a TrainConfig: how the uint8 images are normalised and mixed, the loss, and the seed.
      epoch: an Epoch, whose plan says in which parts the batch comes and which images share batch statistics.
      state: a State, in the arrays of the packing.
      batch: {"images": uint8 (parts, R, H, W, C), "labels": (parts, R)}, in the last batch of an epoch "mask": (parts,
        R), 0 for padding, "flip", "erase" as in `normalization.network_inputs`, and "teacher": (parts, R, num_classes),
        stored logits to learn.
      constants: the Constants of the run.
      teacher: a Teacher.
      packing: the Packing of the state.
    Returns:
      The next State, and the batch's {"loss", "top1", "top5", "grad_norm"}, top1 and top5 in percent. Where images are
      mixed, the label with the larger share counts.
    """
    plan, device = epoch.plan, jax.lax.axis_index(AXIS)
    dropout_key, mixing_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    variables = packing.unpack(state.variables)
    images = jax.lax.psum(batch["mask"].sum(), AXIS) if "mask" in batch else plan.batch_size

    def one_part(number):
        part = {name: column[number] for name, column in batch.items()}
        groups = plan.groups_on(number, device, part.get("mask"))
        inputs, targets = mix_part(config, plan, mixing_key, part, groups)
        if teacher:
            taught, _ = teacher.module.apply(constants.teacher, inputs(teacher.preprocess, module.dtype))
            targets = targets._replace(teacher=taught)

        def loss_fn(params):
            params = jax.tree.map_with_path(
                lambda path, leaf: jax.lax.stop_gradient(leaf) if is_frozen(path, config.frozen) else leaf, params
            )
            (logits, _), updates = state.apply_fn(
                {"params": params, "batch_stats": variables["batch_stats"]},
                inputs(config.preprocess, module.dtype),
                train=True,
                batch_groups=groups,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            ranks = label_ranks(logits, targets.main)
            losses = image_losses(config, logits, targets, constants.class_weights)
            figures = {"loss": losses, "top1": 100.0 * (ranks < 1), "top5": 100.0 * (ranks < 5)}
            if "mask" in part:
                figures = {name: jnp.where(part["mask"] > 0, column, 0) for name, column in figures.items()}
            sums = {name: column.sum() / images for name, column in figures.items()}
            # The statistics move by the mean over all groups: every part and device has equally many.
            statistics = jax.tree.map(lambda leaf: leaf / plan.parts, updates["batch_stats"])
            return sums["loss"], (statistics, sums)

        (_, (statistics, sums)), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        moves = packing.pack({"params": grads, "batch_stats": statistics})
        return moves["params"], moves["batch_stats"], sums

    if plan.parts == 1:
        summed = one_part(0)
    else:
        shapes = jax.eval_shape(one_part, 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        summed = jax.lax.fori_loop(
            0, plan.parts, lambda number, total: jax.tree.map(jnp.add, total, one_part(number)), zeros
        )
    grads, statistics, sums = summed
    # Groups keep their own batch statistics, as PyTorch DDP does; only the running averages are shared.
    grads, sums = jax.lax.psum((grads, sums), AXIS)
    statistics = jax.lax.pmean(statistics, AXIS)
    if config.recalibrate:
        statistics = recalibrate(state.step - count_steps(config, epoch), state.batch_stats, statistics)
    # XLA's CPU maximum drops NaN, so that a loss can look sound when the gradient no longer is.
    metrics = {**sums, "grad_norm": optax.tree.norm(grads)}
    after = state.apply_gradients(grads=grads, batch_stats=statistics)
    if config.ema_decay:
        after = after.replace(ema=average_weights(config, epoch, state.step, state.ema, after.variables))
    return after, metrics


def mix_part(config, plan, key, part, groups):
    """Mix the images of a part of a batch, where the configuration asks for mixup or CutMix.

    Args:
      config: a TrainConfig.
      plan: the BatchPlan.
      key: a JAX key, that of the step.
      part: the batch's arrays (R, ...) on this device.
      groups: the BatchGroups of the part.
    Returns:
      (a function from a Preprocess and a dtype to the network's input, the Targets).
    """
    labels, stored = part["labels"], part.get("teacher")
    if not (config.mixup or config.cutmix):
        return partial(normalization.network_inputs, part), Targets(labels, labels, teacher=stored)

    size = part["images"].shape[1:3]
    share, weights = mixing.draw(key, groups.places // plan.group, config.mixup, config.cutmix, *size)
    following = groups.following(labels)

    def inputs(preprocess, dtype):
        wide = normalization.network_inputs(part, preprocess, jnp.promote_types(dtype, jnp.float32))
        return mixing.mix(wide, weights, groups).astype(dtype)

    return inputs, Targets(
        labels,
        main=jnp.where(share < 0.5, following, labels),
        following=following,
        share=share,
        teacher=stored,
        teacher_following=None if stored is None else groups.following(stored),
    )
