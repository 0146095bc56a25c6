"""Networks of random tables, and what must hold of each in JAX and in PyTorch."""

import jax
import numpy as np
import torch
from conftest import lively_network
from numpy.testing import assert_allclose, assert_array_equal

from shufflenet_jax.architecture import Table, fault_of
from shufflenet_jax.config import MMPRETRAIN_EVAL
from shufflenet_jax.deploy import deploy
from shufflenet_jax.exports import graph, runtime
from shufflenet_jax.porting import convert, dialects

SIDE, CLASSES = 64, 7
FEWER_PIXELS = MMPRETRAIN_EVAL.with_side(SIDE)


def random_table(seed, layout, *, most_units=6):
    """A Table that a layout can have; in layout torchvision a stage may be narrower than the one before."""
    rng = np.random.default_rng(seed)
    channels = [int(rng.integers(1, 40))]
    for _ in range(3):
        least = channels[-1] // 2 + 1 if layout == "megvii" else 1
        channels.append(2 * int(rng.integers(least, least + 40)))
    table = Table((*channels, int(rng.integers(1, 200))), tuple(map(int, rng.integers(1, most_units + 1, 3))))
    assert fault_of(table, layout) is None
    return table


def assert_network_is_pytorchs(dialect, table, folder, *, seed=0):
    """A file of a network with a table converts, computes what PyTorch computes in every form, and comes back."""
    network = lively_network(dialect, table, CLASSES, seed=seed)
    torch.save(network.state_dict(), folder / "net.pth")
    conversion = convert.convert(convert.read(folder / "net.pth"))
    module, variables = conversion.module, conversion.variables
    assert (conversion.dialect, module.table) == (dialect, table)
    back = convert.back_to_torch(module, variables, conversion.info, dialect)
    assert list(back) == list(network.state_dict())
    for key, tensor in network.state_dict().items():
        assert_array_equal(back[key], tensor)

    images = np.random.default_rng(seed).normal(size=(2, SIDE, SIDE, 3))
    with torch.no_grad():
        logits, features = network.double()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    expected = {name: convert._channels_last(feature.numpy()) for name, feature in features.items()}
    with jax.enable_x64(True):
        ours, our_features = jax.jit(module.clone(dtype=np.float64, lowering="reference").apply)(variables, images)
    assert our_features.keys() == expected.keys()
    for name, array in {**our_features, "logits": ours}.items():
        theirs = {**expected, "logits": logits.numpy()}[name]
        # float64 rounds 1e-16 an operation; random weights amplify it some thousand times.
        assert_allclose(array, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max(), err_msg=name)

    single, largest = images.astype(np.float32), np.abs(logits.numpy()).max()
    deployed, weights = deploy(module, variables)
    assert_allclose(jax.jit(deployed.apply)(weights, single)[0], logits, rtol=0, atol=1e-5 * largest)
    model, _ = graph.make_model(module, variables, FEWER_PIXELS)
    (found,) = runtime.run(runtime.load(model), np.ascontiguousarray(single.transpose(0, 3, 1, 2)))
    assert_allclose(found, logits, rtol=0, atol=1e-5 * largest)


DIALECTS = tuple(dialects.DIALECTS)
