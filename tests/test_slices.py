"""Steps compiled for devices that are not here, and what is counted in their programs."""

import dataclasses
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shufflenet_jax import hlo, parallel, slices
from shufflenet_jax.architecture import Table
from shufflenet_jax.batch_groups import Epoch
from shufflenet_jax.commands import train
from shufflenet_jax.data.pipeline import train_batches
from shufflenet_jax.data.sources import Example, Source
from shufflenet_jax.errors import InputError
from shufflenet_jax.model import ShuffleNetV2, variable_shapes
from shufflenet_jax.recipes import PRESETS
from shufflenet_jax.slices import Slice, find_slice
from shufflenet_jax.training.ahead import batch_shapes, compile_ahead

TINY = Table((8, 16, 16, 16, 32), (1, 1, 1))
TABLE = ("--channels", "8,16,16,16,32", "--repeats", "1,1,1")
LAYERS = 2 + 3 * 5  # Batch norms of conv1 and conv5, and of the three units, all with stride 2.
DIGITS = dataclasses.replace(PRESETS["digits"], image_size=8, channels=TINY.channels, repeats=TINY.repeats, width=None)
PROGRAM = """HloModule step, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scatters (p: f32[4,8]) -> f32[2,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %part = f32[2,8]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %values = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %summed = f32[4,8]{1,0} all-reduce(%values), replica_groups={{0,1}}, to_apply=%add
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%values, %summed)
}

%condition (state: (s32[], f32[4,8])) -> pred[] {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%number, %limit), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0:T(4,128)} parameter(0)
  %zero = s32[] constant(0)
  %both = (s32[], /*index=1*/f32[4,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], /*index=1*/f32[4,8]{1,0}) while(%both), condition=%condition, body=%body NOTE
  %y = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %gather-start = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%narrow), dimensions={0}
  %narrow = bf16[2,8]{1,0} fusion(%y), kind=kLoop, calls=%elsewhere
  %gathered = bf16[4,8]{1,0} all-gather-done(%gather-start)
  %part = f32[2,8]{1,0:T(2,128)S(1)} fusion(%y), kind=kCustom, calls=%scatters
  ROOT %out = f32[4,8]{1,0} copy(%y)
}
"""


def test_a_program_is_counted_with_its_loops_and_without_what_stays_on_the_chip():
    program = PROGRAM.replace(" NOTE", "").replace(", calls=%elsewhere", "")
    # The gather's operand comes before it, as in every program; it stands behind here to be easily read.
    lines = program.splitlines()
    start = next(i for i, line in enumerate(lines) if "all-gather-start(" in line)
    lines[start], lines[start + 1] = lines[start + 1], lines[start]
    counts = hlo.count("\n".join(lines))
    assert counts.collectives == {
        "all-reduce": hlo.Exchange(3, 3 * 4 * 32),
        "all-gather": hlo.Exchange(1, 2 * 32),
        "reduce-scatter": hlo.Exchange(1, 4 * 32),
    }
    assert counts.total == hlo.Exchange(5, 3 * 128 + 64 + 128)
    loop = 3 * (128 + 128)  # Read and written by each run of the body.
    narrow, gather, part, copy = 128 + 32, 32 + 64, 128 + 0, 128 + 128
    assert counts.touched == loop + narrow + gather + part + copy


def test_a_loop_runs_as_often_as_the_program_notes(caplog):
    noted = PROGRAM.replace("NOTE", ', backend_config={"known_trip_count":{"n":"7"}}').replace(", calls=%elsewhere", "")
    assert hlo.count(noted).collectives["all-reduce"].number == 7
    unknown = PROGRAM.replace(" NOTE", "").replace(", calls=%elsewhere", "").replace("constant(3)", "parameter(1)")
    assert hlo.count(unknown).collectives["all-reduce"].number == 1
    assert "does not say how often its loop loop runs" in caplog.text


def test_what_xla_compiles_here_is_counted():
    """Seven sums over four devices, each of 5 float32 numbers, in a loop."""

    def summed(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jax.lax.psum(y, parallel.AXIS) / 4, x)

    text = jax.pmap(summed, parallel.AXIS).lower(jnp.ones((4, 5), jnp.float32)).compile().as_text()
    assert hlo.count(text).collectives == {"all-reduce": hlo.Exchange(7, 7 * 20)}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v9:2x2", "'v9:2x2' is not the name of a slice of accelerators; names are like v5e:16x16, "),
        ("v5e", "is not the name of a slice"),
        ("v5e:2", "is not the name of a slice"),
        ("v5p:2x2", "is not the name of a slice"),
        ("v5e:0x2", "is not the name of a slice"),
        ("h100:8", "is not the name of a slice"),
        ("h100:1x8x", "is not the name of a slice"),
    ],
)
def test_slices_that_do_not_exist_are_refused(refused, name, told):
    assert told in refused(train.main, "--config", "in1k", "--compile-for", name)


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [("v5e:2x2", "libtpu", "pip install 'jax[tpu]=="), ("h100:1x8", "JAX's CUDA plugin", "pip install 'jax[cuda13]==")],
)
def test_a_missing_compiler_is_named_with_what_brings_it(refused, monkeypatch, name, package, install):
    monkeypatch.setattr(slices, "find_spec", lambda name: None)
    line = refused(train.main, "--config", "in1k", "--compile-for", name)
    assert f"needs {package}, which is not installed" in line and install in line


def test_options_that_contradict_each_other_are_refused(refused, tmp_path):
    digits = ("--config", "digits")
    assert "give both" in refused(train.main, *digits, "--dump", tmp_path)
    assert "takes no step" in refused(train.main, *digits, "--compile-for", "v5e:2x2", "--profile", tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_shapes_that_are_compiled_are_those_that_training_feeds(preset):
    """Of eight black images in two parts, as the pipeline makes them of real ones."""
    size = PRESETS[preset].image_size or (64, 96)  # What a rule leaves open; a rectangle.
    config = dataclasses.replace(PRESETS[preset], batch_size=8, bn_group_size=2, accumulate=2, image_size=size)
    epoch = Epoch(8, parallel.plan_for_devices(config, jax.devices()[:2]))
    black = np.zeros((40, 50, 3), np.uint8)
    source = Source(8, lambda i: Example(str(i), black, 1), 3, None, tuple)
    (batch,) = train_batches(source, config, epoch.plan, stop_step=1)
    del batch["damaged"]
    (fed,) = parallel.feed([batch], epoch.plan, jax.devices()[:2])
    expected = {name: (array.shape, array.dtype) for name, array in fed.items()}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch_shapes(config, epoch).items()} == expected


def slice_of(devices):
    """The devices of this machine as a Slice."""
    return Slice("here", tuple(jax.devices()[:devices]), 2**30, {})


def test_a_step_exchanges_once_each_way_for_a_batch_norm_that_spans_devices_in_each_part_of_the_batch():
    config = dataclasses.replace(DIGITS, batch_size=32, bn_group_size=16, accumulate=2, lowering="reference")
    step = compile_ahead(config, slice_of(2))
    assert (step.epoch.plan.parts, step.epoch.plan.device_batch) == (2, 8)
    counts = step.counts.collectives
    assert counts.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert counts["all-gather"].number == counts["reduce-scatter"].number == 2 * LAYERS
    module = ShuffleNetV2(channels=TINY.channels, repeats=TINY.repeats, num_classes=10, in_chans=1, small_stem=True)
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(module)["params"]))
    assert parameters <= counts["all-reduce"].size < 1.5 * parameters, "the gradients once, statistics and figures"
    assert step.memory.arguments > 3 * parameters / 2 and step.memory.temporaries > parameters
    assert step.counts.touched > step.memory.arguments and step.text.startswith("HloModule")


def test_a_batch_that_the_slice_does_not_divide_is_refused():
    with pytest.raises(InputError, match="batch_size is 64, but must be a multiple of the 3 devices"):
        compile_ahead(DIGITS, slice_of(3))


def test_a_step_with_a_teacher_is_refused():
    with pytest.raises(InputError, match="omit `teacher`"):
        compile_ahead(dataclasses.replace(DIGITS, teacher="net.pth"), slice_of(2))


def test_a_linear_probe_is_refused():
    with pytest.raises(InputError, match="omit `linear_probe`"):
        compile_ahead(dataclasses.replace(DIGITS, linear_probe=True, init_from="net.pth"), slice_of(2))


tpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed")


@tpu
def test_a_step_compiles_for_a_tpu_slice_that_is_not_here(call, tmp_path):
    options = ("--config", "digits", *TABLE, "--image-size", "8", "--bn-group-size", "16")
    status, out, told = call(train.main, *options, "--compile-for", "v5e:2x2", "--dump", tmp_path / "new/folder")
    assert status == 0 and not told, "the compiler's own words are not shown"
    assert "on 4 device(s)" in out and "\nfits: 0.0" in out and " all-reduce 1, " in out
    assert "tpu" in (tmp_path / "new/folder/v5e-2x2.hlo").read_text()


@tpu
@pytest.mark.parametrize("name", ["v5e:3x7", "v5e:1x1"])
def test_slices_that_libtpu_does_not_know_are_refused_with_its_reason(refused, name):
    assert f"nothing compiles for {name}: Topology layout" in refused(
        train.main, "--config", "digits", "--compile-for", name
    )


@tpu
def test_a_slice_that_does_not_divide_the_batch_is_refused(refused):
    line = refused(train.main, "--config", "digits", "--compile-for", "v5e:16x16")
    assert "batch_size is 64" in line and "256 devices" in line


@tpu
def test_a_slice_has_devices_on_many_hosts():
    devices = find_slice("v5e:16x16").devices
    assert len(devices) == 256 and {device.platform for device in devices} == {"tpu"}
