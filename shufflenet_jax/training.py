"""State, schedule, optimiser, loss and one step of training: pure functions of one device.

The update is PyTorch's SGD: L2 is added to the gradient before momentum, and batch norm's parameters do not decay.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from .data import transforms
from .evaluation import label_ranks
from .model import init_variables

AXIS = "devices"  # Over which the steps of all devices are averaged.


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
    """The learning rate of step t = 0 .. total_steps - 1: falling linearly to 0, a tenth of it during warm-up."""

    def learning_rate(step):
        falling = config.learning_rate * (total_steps - step) / total_steps
        return falling * jnp.where(step < config.warmup_steps, 0.1, 1.0)

    return learning_rate


def make_optimizer(config, total_steps):
    """SGD with momentum and coupled L2."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.sgd(make_schedule(config, total_steps), momentum=config.momentum),
    )


def decays(params):
    """A tree of booleans: whether L2 applies. It does to all but batch norm's scale and bias."""
    return jax.tree.map_with_path(lambda path, _: all(entry.key != "bn" for entry in path), params)


def train_step(module, preprocess, seed, state, batch):
    """One SGD step on this device's share of the batch; gradients averaged over all devices.

    Args:
      module: a ShuffleNetV2 with a classifier.
      preprocess: a Preprocess: how the uint8 images are normalised.
      seed: of dropout.
      state: a State.
      batch: {"images": uint8 (B, H, W, C), "labels": (B,)}, and "flip", "erase" as in `transforms.network_inputs`.
    Returns:
      The next State, and the batch's {"loss", "top1", "top5"}, the last two in percent.
    """
    images = transforms.network_inputs(batch, preprocess, module.dtype)
    dropout = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), jax.lax.axis_index(AXIS))

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        (logits, _), updates = state.apply_fn(
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout}
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
        return loss, (updates["batch_stats"], logits)

    (loss, (batch_stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    ranks = label_ranks(logits, batch["labels"])
    metrics = {"loss": loss, "top1": 100 * (ranks < 1).mean(), "top5": 100 * (ranks < 5).mean()}
    # Each device keeps its own batch statistics, as PyTorch DDP does; only the running averages are shared.
    grads, batch_stats, metrics = jax.lax.pmean((grads, batch_stats, metrics), AXIS)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), metrics
