"""State, schedule, optimiser and one step of training: pure functions of one device.

The update is PyTorch's SGD: L2 is added to the gradient before momentum.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from .config import Preprocess
from .data import mixing, transforms
from .errors import InputError
from .evaluation import label_ranks
from .losses import image_losses
from .model import MOMENTUM
from .rows import AXIS


class State(train_state.TrainState):
    """Everything that the next step depends on: step, params, opt_state, batch_stats and, where kept, averages."""

    batch_stats: Any
    ema: Any  # {"params", "batch_stats"}, moving averages of both, or None.

    @property
    def variables(self):
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def optimizer(self):
        return {"step": self.step, "opt_state": self.opt_state}


class Teacher(NamedTuple):
    """A network whose predictions another one learns; its weights are an argument of the step."""

    module: Any  # `apply(weights, images)` returns (logits, features).
    preprocess: Preprocess


def create_state(module, config, epoch, variables):
    """The state before the first step of a run, from a network's {"params", "batch_stats"}."""
    return State.create(
        apply_fn=module.apply,
        tx=make_optimizer(config, epoch),
        **variables,
        # Copies, for the step overwrites both.
        ema=jax.tree.map(jnp.array, variables) if config.ema_decay else None,
    ).replace(step=jnp.zeros((), jnp.int32))


def count_steps(config, epoch):
    """The steps of a run that move the parameters; `recalibrate` comes on top."""
    return config.steps or config.epochs * epoch.steps


def peak_rate(config):
    """The learning rate from which the schedule falls."""
    return config.learning_rate * (config.batch_size / config.scale_lr_from if config.scale_lr_from else 1)


def count_warmup(config, epoch):
    """The steps at the start in which the learning rate is reduced."""
    return config.warmup_steps + config.warmup_epochs * epoch.steps


def make_schedule(config, epoch):
    """The learning rate of step t = 0, 1, ...: a pure function.

    Args:
      config: a TrainConfig.
      epoch: the Epoch of its data: how many steps a pass has.
    """
    total, warmup, peak = count_steps(config, epoch), count_warmup(config, epoch), peak_rate(config)
    length = total - (warmup if config.warmup_first else 0)
    if length < 1:
        raise InputError(f"the warm-up takes {warmup} steps of {total}; shorten it or train for longer")
    falling = {
        # Written so, it stays exact in float32.
        "linear": lambda left: peak * left / length,
        "cosine": lambda left: peak * (1 - jnp.cos(math.pi * left / length)) / 2,
        "constant": lambda left: peak,
    }[config.schedule]

    def schedule(step):
        at = step // epoch.steps * epoch.steps if config.lr_every == "epoch" else step
        grown = config.warmup_factor
        if config.warmup == "linear":
            grown += (1 - grown) * at / max(warmup, 1)
        rate = falling(jnp.clip(total - at, 0, length)) * jnp.where(at < warmup, grown, 1.0)
        return jnp.where(step < total, rate, 0.0)

    return schedule


def make_optimizer(config, epoch):
    """SGD with momentum and coupled L2, the way PyTorch computes them; clipping, where asked for, comes first."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        optax.add_decayed_weights(config.weight_decay, lambda params: decays(params, config.decay, config.frozen)),
        optax.sgd(make_schedule(config, epoch), momentum=config.momentum, nesterov=config.nesterov),
    )


def decays(params, which="no_norm", frozen=()):
    """A tree of booleans: whether L2 applies, by a TrainConfig's `decay` and `frozen`."""

    def applies(path, leaf):
        if is_frozen(path, frozen):
            return False
        if which == "matrices":
            return leaf.ndim > 1
        return which == "all" or all(entry.key != "bn" for entry in path)

    return jax.tree.map_with_path(applies, params)


def is_frozen(path, frozen):
    """Whether the leaf at a path of the parameters belongs to a frozen layer or stage."""
    return path[0].key.partition("_unit")[0] in frozen


def decay_table(params, which, frozen=()):
    """Which parameters decay, in lines: kind, tensors, numbers, and whether L2 applies; then what is frozen."""
    kinds, still = {}, [0, 0]
    flags = jax.tree.leaves(decays(params, which))
    for (path, leaf), applies in zip(jax.tree.leaves_with_path(params), flags, strict=True):
        if is_frozen(path, frozen):
            still[0] += 1
            still[1] += leaf.size
            continue
        *above, layer, name = (entry.key for entry in path)
        depthwise = layer == "conv" and above[-1].endswith("_dw")
        kind = f"{'depthwise ' if depthwise else ''}{layer}/{name}"
        tensors, numbers, _ = kinds.get(kind, (0, 0, applies))
        kinds[kind] = tensors + 1, numbers + leaf.size, applies
    rows = [f"{'parameters':24}{'tensors':>8}{'numbers':>12}  weight decay"]
    rows += [f"{kind:24}{n:8}{size:12,}  {'yes' if on else 'no'}" for kind, (n, size, on) in kinds.items()]
    if frozen:
        rows.append(f"{'frozen':24}{still[0]:8}{still[1]:12,}  {', '.join(frozen)}, with their statistics")
    return "\n".join(rows)


def train_step(module, config, epoch, state, batch, fixed, *, teacher=None):
    """One SGD step on this device's share of the batch; the gradient is that of the mean over all images.

    Args:
      module: a ShuffleNetV2 with a classifier.
      config: a TrainConfig: how the uint8 images are normalised and mixed, the loss, and the seed.
      epoch: an Epoch, whose Layout says in which parts the batch comes and which images share batch statistics.
      state: a State.
      batch: {"images": uint8 (parts, R, H, W, C), "labels": (parts, R)}, in the last batch of an epoch "mask": (parts,
        R), 0 for padding, "flip", "erase" as in `transforms.network_inputs`, and "teacher": (parts, R, num_classes),
        stored logits to learn.
      fixed: arrays that no step changes, where they are asked for: {"class_weights": (num_classes,), "teacher": the
        weights of the teacher}.
      teacher: a Teacher.
    Returns:
      The next State, and the batch's {"loss", "top1", "top5", "grad_norm"}, top1 and top5 in percent. Where images are
      mixed, the label with the larger share counts.
    """
    layout, device = epoch.layout, jax.lax.axis_index(AXIS)
    dropout_key, mixing_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    images = jax.lax.psum(batch["mask"].sum(), AXIS) if "mask" in batch else layout.batch_size

    def one_part(number):
        part = {name: column[number] for name, column in batch.items()}
        rows = layout.rows_of(number, device, part.get("mask"))
        inputs, targets = mixed(config, layout, mixing_key, part, rows)
        if teacher:
            targets["teacher"] = teacher.module.apply(fixed["teacher"], inputs(teacher.preprocess, module.dtype))[0]

        def loss_fn(params):
            params = jax.tree.map_with_path(
                lambda path, leaf: jax.lax.stop_gradient(leaf) if is_frozen(path, config.frozen) else leaf, params
            )
            (logits, _), updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                inputs(config.preprocess, module.dtype),
                train=True,
                rows=rows,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            ranks = label_ranks(logits, targets["main"])
            losses = image_losses(config, logits, targets, fixed.get("class_weights"))
            figures = {"loss": losses, "top1": 100.0 * (ranks < 1), "top5": 100.0 * (ranks < 5)}
            if "mask" in part:
                figures = {name: jnp.where(part["mask"] > 0, column, 0) for name, column in figures.items()}
            sums = {name: column.sum() / images for name, column in figures.items()}
            # The statistics move by the mean over all groups: every part and device has equally many.
            statistics = jax.tree.map(lambda leaf: leaf / layout.parts, updates["batch_stats"])
            return sums["loss"], (statistics, sums)

        (_, (statistics, sums)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
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
    if config.recalibrate:
        statistics = recalibrated(state.step - count_steps(config, epoch), state.batch_stats, statistics)
    # XLA's CPU maximum drops NaN, so that a loss can look sound when the gradient no longer is.
    metrics = {**sums, "grad_norm": optax.tree.norm(grads)}
    after = state.apply_gradients(grads=grads, batch_stats=statistics)
    if config.ema_decay:
        after = after.replace(ema=averaged(config, epoch, state.step, state.ema, after.variables))
    return after, metrics


def mixed(config, layout, key, part, rows):
    """What a part of a batch becomes once its images are mixed, where the configuration asks for that.

    Returns:
      (A function from a Preprocess and a type to the network's input, {"labels", "following", "share": (R,), the share
      of `labels`, "main": the label with the larger one, "teacher": stored logits}).
    """
    labels = part["labels"]
    targets = {"labels": labels, "main": labels}
    if "teacher" in part:
        targets["teacher"] = part["teacher"]
    if not (config.mixup or config.cutmix):
        return partial(transforms.network_inputs, part), targets

    size = part["images"].shape[1:3]
    share, weights = mixing.draw(key, rows.places // layout.group, config.mixup, config.cutmix, *size)
    following = rows.following(labels)
    targets |= {"following": following, "share": share, "main": jnp.where(share < 0.5, following, labels)}
    if "teacher" in part:
        targets["teacher following"] = rows.following(part["teacher"])

    def inputs(preprocess, dtype):
        wide = transforms.network_inputs(part, preprocess, jnp.promote_types(dtype, jnp.float32))
        return mixing.mix(wide, weights, rows).astype(dtype)

    return inputs, targets


def recalibrated(number, before, after):
    """Running statistics as the mean over the batches from `number` 0 on; those before it are left as they are.

    Args:
      number: of this step, counted from the first that takes part.
      before, after: the statistics before and after they moved by 1 - MOMENTUM to those of the batch.
    """
    share = 1 / ((1 - MOMENTUM) * jnp.maximum(number + 1, 1))
    return jax.tree.map(lambda old, new: jnp.where(number < 0, new, old + (new - old) * share), before, after)


def averaged(config, epoch, step, old, new):
    """The moving average after a step: PyTorch's AveragedModel, as torchvision's script updates it.

    It is a copy until the warm-up is over, and at the first update after that.
    """
    place = step % epoch.steps
    due = (place % config.ema_every == 0) & (step < count_steps(config, epoch))
    # That of the update before, which the end of an epoch may have brought nearer; of the first one it is below 0.
    last = step - jnp.where(place > 0, config.ema_every, (epoch.steps - 1) % config.ema_every + 1)
    kept = jnp.where(last < count_warmup(config, epoch), 0, config.ema_decay)
    return jax.tree.map(lambda a, b: jnp.where(due, kept * a + (1 - kept) * b, a), old, new)
