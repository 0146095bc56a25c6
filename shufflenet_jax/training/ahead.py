"""A training step compiled for devices that are not here: its memory, its collectives and the bytes that it touches."""

import dataclasses
import time
from typing import NamedTuple

import jax
import numpy as np

from .. import hlo, lowerings, parallel
from ..batch_groups import Epoch
from ..config import TrainConfig
from ..data.pipeline import blank_row
from ..data.sources import KNOWN_CLASSES, KNOWN_SIZES, Example, Reader, Source, open_source
from ..errors import InputError
from ..model import variable_shapes
from ..slices import Slice
from .loop import describe_model, map_step, network_of, require_trainable
from .packing import packing_for
from .rule import settle
from .state import create_state
from .supervision import load_supervision


class Memory(NamedTuple):
    """XLA's plan of a step's memory on each device, in bytes, without batches that wait for later steps.

    Attributes:
      arguments: the state and a batch.
      results: the next state and the metrics, unless they replace the arguments.
      temporaries: intermediate results, most of them activations.
      program: the code.
    """

    arguments: int
    results: int
    temporaries: int
    program: int


class CompiledStep(NamedTuple):
    """A step of a training, compiled for a Slice.

    Attributes:
      config: the TrainConfig, with all values chosen.
      epoch: the Epoch, whose plan says how the devices divide a batch.
      memory: on each device.
      counts: collectives and bytes on each device.
      text: the optimized program.
      seconds: how long compiling took.
    """

    config: TrainConfig
    epoch: Epoch
    memory: Memory
    counts: hlo.Counts
    text: str
    seconds: float

    @property
    def touched_per_image(self) -> float:
        """Bytes of main memory that a device touches for each of its images."""
        return self.counts.touched * self.epoch.plan.devices / self.epoch.plan.batch_size


class TooLargeError(Exception):
    """A step does not fit into the memory of a device; the message says how much it needs."""


def open_training_data(config: TrainConfig) -> Source:
    """Open the data to train on. If known data are not here, return a Source that has only their numbers.

    Args:
      config: the settings.

    Raises:
      InputError: the data cannot be opened, and nothing is known about them.
    """
    try:
        return open_source(
            config.data,
            config.train_split,
            data_dir=config.data_dir,
            val_share=config.val_share,
            reader=Reader("train_split"),
        )
    except InputError:
        if config.data not in KNOWN_SIZES or config.rule != "none":  # A rule looks at the images.
            raise
        return Source(KNOWN_SIZES[config.data], _read_nothing, KNOWN_CLASSES[config.data], None, tuple)


def _read_nothing(index: int) -> Example:
    raise InputError(f"image {index} is not here")


def compile_ahead(config: TrainConfig, target: Slice) -> CompiledStep:
    """Compile the training step of a Slice, for full batches.

    Args:
      config: the settings.
      target: the Slice, from `find_slice`.

    Raises:
      InputError: the Slice does not divide the batch, the settings are unusable, or the compiler refuses them.
      TooLargeError: the step does not fit.
    """
    if config.teacher:
        raise InputError("a step with a teacher cannot be compiled ahead; omit `teacher`")
    if config.linear_probe:
        raise InputError("a linear probe has no step to compile ahead; omit `linear_probe`")
    config = _for_platform(config, target.devices[0].platform)
    with jax.enable_x64(config.dtype == "float64"):
        source = open_training_data(config)
        config, _ = settle(config, source, {}, devices=len(target.devices))
        info = describe_model(config, source)
        epoch = Epoch(len(source), parallel.plan_for_devices(config, target.devices))
        require_trainable(config, epoch)
        module = network_of(config, info)
        variables = variable_shapes(module)
        packing = packing_for(module, config, variables)
        state = jax.eval_shape(
            lambda variables: packing.pack_state(create_state(module, config, epoch, variables)), variables
        )
        constants = load_supervision(config, source, info).constants
        step = map_step(module, config, epoch, packing=packing, devices=target.devices)
        lowered = step.lower(state, batch_shapes(config, epoch), constants)
        return _compile(lowered, config, epoch, target)


def _for_platform(config: TrainConfig, platform: str) -> TrainConfig:
    """Return the settings with the lowering that "auto" would pick on a platform."""
    if config.lowering != "auto":
        return config
    return dataclasses.replace(config, lowering=lowerings.fastest_on(platform))


def batch_shapes(config: TrainConfig, epoch: Epoch) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and types of a full batch, as `parallel.feed` puts it on all devices.

    Args:
      config: the settings.
      epoch: whose plan says how the devices divide the batch.
    """
    plan = epoch.plan
    lead = (plan.devices, plan.parts, plan.device_batch)
    columns = {name: np.asarray(value) for name, value in blank_row(config).items()}
    return {
        name: jax.ShapeDtypeStruct((*lead, *column.shape), jax.dtypes.canonicalize_dtype(column.dtype))
        for name, column in columns.items()
    }


def _compile(lowered: jax.stages.Lowered, config: TrainConfig, epoch: Epoch, target: Slice) -> CompiledStep:
    began = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" in reason:
            raise TooLargeError(reason) from error
        raise InputError(f"nothing compiles the step for {target.name}: {reason}; choose other settings") from error
    seconds = time.monotonic() - began
    sizes = compiled.memory_analysis()
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        results=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        program=sizes.generated_code_size_in_bytes,
    )
    text = compiled.as_text()
    return CompiledStep(config, epoch, memory, hlo.count(text), text, seconds)
