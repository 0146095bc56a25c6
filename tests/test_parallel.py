import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from shufflenet_jax import parallel
from shufflenet_jax.batch_groups import plan_batch

BATCH = {"images": np.arange(24.0, dtype=np.float32).reshape(12, 2), "labels": np.arange(12)}


def layout_of(count, parts=1):
    return plan_batch(12, 0 if parts * count == 1 else 12 // (parts * count), count, parts=parts)


def averaging_step(state, batch, fixed):
    total = jax.lax.pmean(batch["images"].sum(), parallel.AXIS)
    return state + fixed["factor"] * total, {"rows": jax.lax.psum(batch["labels"].size, parallel.AXIS)}


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_train_step_sees_each_row_on_one_device_and_leaves_equal_copies(count):
    devices = jax.devices()[:count]
    step = parallel.map_train_step(averaging_step, devices)
    first, second = parallel.feed([BATCH, BATCH], layout_of(count), devices)
    fixed = parallel.replicate({"factor": np.float32(2)}, devices)
    state, metrics = step(parallel.replicate(np.float32(1), devices), first, fixed)
    assert np.asarray(state) == 1 + 2 * BATCH["images"].sum() / count
    assert np.asarray(metrics["rows"]) == 12
    copies = [np.asarray(shard.data) for shard in state.addressable_shards]
    assert len(copies) == count and all(np.array_equal(copy, copies[0]) for copy in copies)
    state, _ = step(state, second, fixed)  # What a step returns feeds the next one.
    assert np.asarray(state) == 1 + 4 * BATCH["images"].sum() / count


def test_parts_are_dealt_out_in_order_each_over_all_devices():
    fed = next(parallel.feed([BATCH], layout_of(2, parts=3), jax.devices()[:2]))
    assert_array_equal(fed["labels"], [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]])
    assert fed["images"].shape == (2, 3, 2, 2)


def test_batches_are_fed_in_order_and_ahead_of_their_use():
    taken = []

    def batches():
        for number in range(5):
            taken.append(number)
            yield {"labels": np.full(4, number)}

    fed = parallel.feed(batches(), plan_batch(4, 2, 2), jax.devices()[:2], ahead=2)
    assert np.array_equal(next(fed)["labels"], np.zeros((2, 1, 2))) and taken == [0, 1, 2]
    assert [int(batch["labels"].max()) for batch in fed] == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("rows", [1, 7, 12])
def test_an_eval_step_adds_up_over_devices_and_returns_rows_in_order(count, rows):
    def step(factor, batch):
        return {"images": batch["mask"].sum()}, factor["factor"] * batch["labels"]

    batch = {"labels": np.arange(1, rows + 1), "mask": np.ones(rows, np.float32)}
    devices = jax.devices()[:count]
    variables = parallel.replicate({"factor": jnp.int32(2)}, devices)
    sums, labels = parallel.map_eval_step(step, devices)(variables, batch)
    assert np.asarray(sums["images"]) == rows, "padding is masked out"
    assert_array_equal(np.asarray(labels).reshape(-1)[:rows], 2 * batch["labels"])
