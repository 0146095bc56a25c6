"""One step of training: pure functions of one device."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from ..batch_groups import AXIS, BatchGroups, BatchPlan, Epoch
from ..config import Preprocess, TrainConfig
from ..data import mixing, normalization
from ..deploy import Deployed
from ..evaluation.ranking import label_ranks
from ..model import ShuffleNetV2
from ..shapes import Array, Batch, Images, Metrics, Params, Variables
from .averages import average_weights, recalibrate
from .losses import ClassWeights, Targets, image_losses
from .optimizer import is_frozen
from .packing import UNPACKED, Packing
from .schedule import count_steps
from .state import State


class Teacher(NamedTuple):
    """A network whose predictions another one learns; its weights are an argument of the step.

    Attributes:
      module: the network.
      preprocess: how to prepare images for it.
    """

    module: ShuffleNetV2 | Deployed
    preprocess: Preprocess


class Constants(NamedTuple):
    """Arrays that steps read and never change.

    Attributes:
      class_weights: (num_classes,), factors on the losses of each class, or None.
      teacher: the weights of the teacher, or None.
    """

    class_weights: ClassWeights | None = None
    teacher: Variables | None = None


def train_step(
    module: ShuffleNetV2,
    config: TrainConfig,
    epoch: Epoch,
    state: State,
    batch: Batch,
    constants: Constants,
    *,
    teacher: Teacher | None = None,
    packing: Packing = UNPACKED,
) -> tuple[State, Metrics]:
    """Take one step on this device's share of the batch, with the gradient of the mean over all images.

    Args:
      module: the network, with a classifier.
      config: how to normalize and mix the uint8 images, the loss, and the seed.
      epoch: its plan divides the batch into parts and groups of images that share batch statistics.
      state: a State, in the arrays of the packing.
      batch: {"images": uint8 (parts, R, H, W, C), "labels": int (parts, R)} and, if they apply, "mask": (parts, R), 0
        for padding in the last batch of an epoch, "flip" and "erase" as in `normalization.network_inputs`, and
        "teacher": (parts, R, num_classes), stored logits to learn.
      constants: the Constants of the run.
      teacher: the network to learn from.
      packing: the Packing of the state.

    Returns:
      (the next State, {"loss", "top1", "top5", "grad_norm"} of the batch). top1 and top5 are in percent; of mixed
      images the label with the larger share counts.
    """
    plan, device = epoch.plan, jax.lax.axis_index(AXIS)
    dropout_key, mixing_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    variables = packing.unpack(state.variables)
    images = jax.lax.psum(batch["mask"].sum(), AXIS) if "mask" in batch else plan.batch_size

    def one_part(number: Array | int) -> tuple[Params, Params, Metrics]:
        part = {name: column[number] for name, column in batch.items()}
        groups = plan.groups_on(number, device, part.get("mask"))
        inputs, targets = mix_part(config, plan, mixing_key, part, groups)
        if teacher and constants.teacher is not None:
            taught, _ = teacher.module.apply(constants.teacher, inputs(teacher.preprocess, module.dtype))
            targets = targets._replace(teacher=taught)

        def loss_fn(params: Params) -> tuple[Array, tuple[Params, Metrics]]:
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
    # XLA's maximum on CPUs drops NaN, so the loss may look finite when the gradient is not.
    metrics = {**sums, "grad_norm": optax.tree.norm(grads)}
    after = state.apply_gradients(grads=grads, batch_stats=statistics)
    if config.ema_decay:
        after = after.replace(ema=average_weights(config, epoch, state.step, state.ema, after.variables))
    return after, metrics


def mix_part(
    config: TrainConfig, plan: BatchPlan, key: Array, part: Batch, groups: BatchGroups
) -> tuple[Callable[[Preprocess, DTypeLike], Images], Targets]:
    """Mix the images of a part of a batch, if the settings ask for mixup or CutMix.

    Args:
      config: the settings.
      plan: how the batch is divided.
      key: the random key of the step.
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

    def inputs(preprocess: Preprocess, dtype: DTypeLike) -> Images:
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
