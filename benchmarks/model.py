"""Milliseconds of inference and of a training step: ours beside PyTorch, torch.compile, ONNX Runtime and OpenVINO.

    python benchmarks/model.py --json model.json --plot model.png

PyTorch and ONNX Runtime are among the project's requirements; `pip install openvino` adds the last. Contenders that are
not installed are skipped with a note. ONNX Runtime and OpenVINO run files of our own `export`. Every contender runs in
a separate process; they alternate, several times. The medians of times and of each round's ratios go to stdout as a
table. OpenVINO would choose bfloat16 on CPUs that have it; here it computes in float32, and has a second row for
bfloat16. On a GPU: `--dtype bfloat16 --inference 256 1024 --training 256 1024`.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from shufflenet_jax.config import TrainConfig
    from shufflenet_jax.model import ShuffleNetV2
    from shufflenet_jax.shapes import Variables

sys.path.insert(0, str(Path(__file__).parent.parent))

Call = Callable[[], object]
Key = tuple[str, str, int]  # "inference" or "training", contender, batch.
Runs = dict[Key, list[dict[str, Any]]]  # What `child` returns for each run.

WITH_FUSIONS = "ours, YNNPACK fusions"  # The network of "ours" without the compiler options that deploy.py chooses.
INFERENCE = {  # {contender: the module that it needs}
    "ours": "jax",
    WITH_FUSIONS: "jax",
    "ours, reference lowering": "jax",
    "PyTorch": "torch",
    "PyTorch, channels last": "torch",
    "torch.compile": "torch",
    "torch.compile, channels last": "torch",
    "ONNX Runtime": "onnxruntime",
    "ONNX Runtime, int8": "onnxruntime",
    "OpenVINO": "openvino",
    "OpenVINO, bfloat16": "openvino",
}
TRAINING = [name for name, module in INFERENCE.items() if module in ("jax", "torch") and name != WITH_FUSIONS]
COMPILED = ("torch.compile", "torch.compile, channels last")


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inference", type=int, nargs="*", default=[1, 8, 32, 128], help="batch sizes (%(default)s)")
    parser.add_argument("--training", type=int, nargs="*", default=[32, 64], help="batch sizes (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="measured time of a run (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="contenders to run (default: all)")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--plot", type=Path, help="draw time against batch, resolution and width there, as PNG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(**json.loads(options.child))))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"dtype": options.dtype, "seconds": options.seconds, "folder": folder}
        names = [name for name in INFERENCE if options.only is None or name in options.only]
        wanted = [("inference", name, batch) for batch in options.inference for name in names]
        wanted += [("training", name, batch) for batch in options.training for name in names if name in TRAINING]
        found = measure(wanted, options.rounds, common)
        growth = measure_growth(names, options.rounds, common) if options.plot else []
    print(f"{machine()}; {options.dtype}, 1.0x, 224 x 224; milliseconds, median of {options.rounds} alternating runs\n")
    show(found)
    if options.plot:
        draw(growth, options.plot)
    if options.json:
        rows = [{"kind": k, "contender": n, "batch": b, "runs": runs} for (k, n, b), runs in found.items()]
        figures = {"machine": machine(), "dtype": options.dtype, "rows": rows, "growth": growth}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(wanted: Sequence[Key], rounds: int, common: Mapping[str, Any]) -> Runs:
    """Run all contenders alternately.

    Args:
      wanted: what to run.
      rounds: runs of each.
      common: arguments of `child` for all.

    Returns:
      {what: the result of each run}.
    """
    reasons = {name: reason for name in dict.fromkeys(name for _, name, _ in wanted) if (reason := why_not(name))}
    for name, reason in reasons.items():
        print(f"note: {name} is skipped: {reason}", file=sys.stderr)
    found: Runs = {}
    for number in range(rounds):
        for kind, name, batch in wanted:
            if name in reasons:
                continue
            print(f"round {number + 1} of {rounds}: {kind}, batch {batch}, {name}", file=sys.stderr)
            spec = {"kind": kind, "name": name, "batch": batch, **common}
            found.setdefault((kind, name, batch), []).append(run_child(spec))
    return found


def why_not(name: str) -> str | None:
    """Return why a contender cannot run here, or None.

    Args:
      name: of the contender.
    """
    if importlib.util.find_spec(INFERENCE[name]) is None:
        return f"{INFERENCE[name]} is not installed"
    if name == "OpenVINO, bfloat16":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "this CPU does not compute in bfloat16"
    return None


def run_child(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run a process, and return the result of `child` in it.

    Args:
      spec: arguments of `child`.
    """
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(spec)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {spec['name']} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(found: Runs) -> None:
    """Print the tables.

    Args:
      found: from `measure`.
    """
    times = {key: [run["milliseconds"] for run in runs] for key, runs in found.items()}
    for kind in ("inference", "training"):
        batches = sorted({batch for k, _, batch in found if k == kind})
        if not batches:
            continue
        heads = " | ".join(f"{kind} {batch} | our time / theirs" for batch in batches)
        last = " peak memory, MiB |" if kind == "training" else ""
        print(f"| contender | {heads} |{last}")
        print(f"| --- |{' --- | --- |' * len(batches)}{' --- |' if last else ''}")
        for name in dict.fromkeys(n for k, n, _ in found if k == kind):
            row = f"| {name} |"
            for batch in batches:
                theirs, ours = times[kind, name, batch], times.get((kind, "ours", batch))
                ratios = [a / b for a, b in zip(ours, theirs, strict=True)] if ours else []
                row += f" {statistics.median(theirs):.1f} | " + (f"{statistics.median(ratios):.2f} |" if ours else "|")
            if last:
                row += f" {statistics.median(run['memory'] for run in found[kind, name, batches[0]]):.0f} |"
            print(row)
        print()


def measure_growth(names: Iterable[str], rounds: int, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measure the time against batch, resolution and width, of ours and of torch.compile's best.

    Args:
      names: of contenders.
      rounds: runs of each point, of which the median counts.
      common: arguments of `child` for all.

    Returns:
      [{axis, value, contender, ...}].
    """
    points: list[tuple[str, dict[str, Any]]]
    points = [("batch", {"batch": batch}) for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    points += [("resolution", {"batch": 8, "resolution": side}) for side in (128, 160, 192, 224, 256, 320)]
    points += [("width", {"batch": 8, "width": width}) for width in (0.5, 1.0, 1.5, 2.0)]
    drawn = [name for name in ("ours", COMPILED[1]) if name in names and importlib.util.find_spec(INFERENCE[name])]
    runs: dict[tuple[int, str], list[float]] = {}
    for number in range(rounds):
        for point, (axis, settings) in enumerate(points):
            for name in drawn:
                print(f"round {number + 1} of {rounds}: growth, {axis} {settings[axis]}, {name}", file=sys.stderr)
                run = run_child({"kind": "inference", "name": name, **settings, **common})
                runs.setdefault((point, name), []).append(run["milliseconds"])
    growth = []
    for (point, name), times in runs.items():
        axis, settings = points[point]
        row = {"axis": axis, "value": settings[axis], "contender": name, **settings}
        growth.append({**row, "milliseconds": statistics.median(times), "runs": times})
    return growth


def draw(growth: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the growth into a PNG file.

    Args:
      growth: from `measure_growth`.
      path: of the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"batch": "images in a batch", "resolution": "side in pixels (batch 8)", "width": "width (batch 8)"}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for panel, (axis, label) in zip(panels, labels.items(), strict=True):
        for name in dict.fromkeys(row["contender"] for row in growth):
            rows = [row for row in growth if row["axis"] == axis and row["contender"] == name]
            per_image = [row["milliseconds"] / row["batch"] for row in rows]
            panel.plot([row["value"] for row in rows], per_image, marker="o", label=name)
        panel.set(xlabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_xscale("log", base=2)
    panels[0].set_ylabel("milliseconds per image")
    panels[0].legend(frameon=False)
    figure.suptitle(f"Inference, {machine()}", fontsize=10)
    figure.savefig(path, dpi=120)


def machine() -> str:
    """Describe this machine."""
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.get_device_name()}, Python {platform.python_version()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(named, platform.processor())}, {cores} cores, Python {platform.python_version()}"


def child(
    kind: str, name: str, batch: int, dtype: str, seconds: float, folder: str, resolution: int = 224, width: float = 1.0
) -> dict[str, float]:
    """Run one contender once.

    Args:
      kind: "inference" or "training".
      name: of the contender.
      batch: size of the batch.
      dtype: of the computation.
      seconds: measured time.
      folder: for files.
      resolution: side of the images, in pixels.
      width: of the network.

    Returns:
      {"milliseconds": of one call, the median of this run, "memory": peak in MiB}.
    """
    work: dict[str, dict[str, Callable[..., Call]]] = {
        "inference": {"jax": jax_inference, "torch": torch_inference},
        "training": {"jax": jax_step, "torch": torch_step},
    }
    others: dict[str, Callable[..., Call]] = {"onnxruntime": onnx_inference, "openvino": openvino_inference}
    build = others.get(INFERENCE[name]) or work[kind][INFERENCE[name]]
    call = build(name, batch, dtype, resolution, width, Path(folder))
    median = median_seconds(call, seconds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"milliseconds": 1e3 * median, "memory": memory}


def median_seconds(call: Call, seconds: float) -> float:
    """Return the median time of a call, after three calls that do not count.

    Args:
      call: to time.
      seconds: time of measuring; there are at least three calls.
    """
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def network(width: float) -> "torch.nn.Module":
    """Return torchvision's network in PyTorch, with seeded weights and running statistics of its own activations.

    Args:
      width: of the network.
    """
    import torch

    from shufflenet_jax.architecture import TABLES
    from shufflenet_jax.porting.reference import NETWORKS

    torch.manual_seed(0)
    found = NETWORKS["torchvision"](TABLES[width], 1000)
    for layer in found.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # The running statistics become those of the batch below.
    found.train()(torch.randn(8, 3, 64, 64))
    return found.eval()


def converted(width: float, dtype: str, *, reference: bool) -> "tuple[ShuffleNetV2, Variables]":
    """Return the same network in JAX.

    Args:
      width: of the network.
      dtype: of the computation.
      reference: whether to use the reference lowering.
    """
    import jax.numpy as jnp

    from shufflenet_jax import environment
    from shufflenet_jax.porting import dialects

    environment.enable_compilation_cache()  # As all commands do.
    environment.keep_freed_memory()
    rules = dialects.DIALECTS["torchvision"]
    tensors = {key: tensor.numpy() for key, tensor in network(width).state_dict().items()}
    module = dialects.module_for(tensors, rules)
    variables = dialects.from_torch(tensors, rules, module)[0]
    return module.clone(dtype=jnp.dtype(dtype), lowering="reference" if reference else "auto"), variables


def jax_inference(name: str, batch: int, dtype: str, resolution: int, width: float, _: Path | None) -> Call:
    """Return the inference of ours, without arguments.

    Args:
      name: of the contender.
      batch: size of the batch.
      dtype: of the computation.
      resolution: side of the images, in pixels.
      width: of the network.
    """
    import jax
    import numpy as np

    from shufflenet_jax.deploy import compile_deployed, deploy

    reference = name not in ("ours", WITH_FUSIONS)
    module, variables = converted(width, dtype, reference=reference)
    network, weights = (module, variables) if reference else deploy(module, variables)
    weights = jax.device_put(weights)
    images = jax.device_put(np.random.default_rng(0).normal(size=(batch, resolution, resolution, 3)).astype("f4"))
    jit: Callable[..., Any] = compile_deployed if name == "ours" else jax.jit
    apply = jit(lambda weights, images: network.apply(weights, images)[0])
    return lambda: jax.block_until_ready(apply(weights, images))


def jax_step(name: str, batch: int, dtype: str, resolution: int, width: float, _: Path | None) -> Call:
    """Return a training step of ours, without arguments.

    Args:
      name: of the contender.
      batch: size of the batch.
      dtype: of the computation.
      resolution: side of the images, in pixels.
      width: of the network.
    """
    from shufflenet_jax.config import TrainConfig

    module, variables = converted(width, dtype, reference=name != "ours")
    config = TrainConfig(data="none", batch_size=batch, bn_group_size=0, accumulate=1, image_size=resolution)
    return training_step(module, variables, config)


def training_step(module: "ShuffleNetV2", variables: "Variables", config: "TrainConfig") -> Call:
    """Return a function that takes a training step on random images, as `train.py` takes it.

    Args:
      module: the network.
      variables: its {"params", "batch_stats"}.
      config: the settings.
    """
    from functools import partial

    import jax
    import numpy as np

    from shufflenet_jax import parallel
    from shufflenet_jax.batch_groups import Epoch
    from shufflenet_jax.training.packing import packing_for
    from shufflenet_jax.training.state import create_state
    from shufflenet_jax.training.step import Constants, train_step

    device = jax.local_devices()[:1]
    plan = parallel.plan_for_devices(config, device)
    epoch = Epoch(1000 * config.batch_size, plan)
    packing = packing_for(module, config, variables)
    state = packing.pack_state(parallel.replicate(create_state(module, config, epoch, variables), device))
    step = parallel.map_train_step(partial(train_step, module, config, epoch, packing=packing), device)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, *config.train_preprocess.size, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = rng.integers(0, module.num_classes, config.batch_size)
    (fed,) = parallel.feed([{"images": images, "labels": labels}], plan, device)

    def call() -> None:
        nonlocal state
        state, metrics = step(state, fed, Constants())
        jax.block_until_ready((state, metrics))

    return call


def torch_network(
    name: str, batch: int, dtype: str, resolution: int, width: float
) -> "tuple[torch.nn.Module, torch.Tensor, dict[str, Any], Call]":
    """Return the network of a contender in PyTorch.

    Args:
      name: of the contender.
      batch: size of the batch.
      dtype: of the computation.
      resolution: side of the images, in pixels.
      width: of the network.

    Returns:
      (network, images, arguments of torch.autocast, a function that waits for the device).
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if name.endswith("channels last") else torch.contiguous_format
    found = network(width).to(device).to(memory_format=layout)
    images = torch.randn(batch, 3, resolution, resolution, device=device).to(memory_format=layout)
    if name in COMPILED:
        found = torch.compile(found)
    autocast = {"device_type": device, "dtype": torch.bfloat16, "enabled": dtype == "bfloat16"}
    return found, images, autocast, torch.cuda.synchronize if device == "cuda" else lambda: None


def torch_inference(name: str, batch: int, dtype: str, resolution: int, width: float, _: Path | None) -> Call:
    """Return the inference of PyTorch, without arguments.

    Args:
      name: of the contender.
      batch: size of the batch.
      dtype: of the computation.
      resolution: side of the images, in pixels.
      width: of the network.
    """
    import torch

    found, images, autocast, wait = torch_network(name, batch, dtype, resolution, width)

    def call() -> None:
        with torch.inference_mode(), torch.autocast(**autocast):
            found(images)
        wait()

    return call


def torch_step(name: str, batch: int, dtype: str, resolution: int, width: float, _: Path | None) -> Call:
    """Return a training step of PyTorch, without arguments.

    Args:
      name: of the contender.
      batch: size of the batch.
      dtype: of the computation.
      resolution: side of the images, in pixels.
      width: of the network.
    """
    import torch

    found, images, autocast, wait = torch_network(name, batch, dtype, resolution, width)
    found.train()
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1, momentum=0.9, weight_decay=4e-5)
    labels = torch.randint(0, 1000, (batch,), device=images.device)

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(**autocast):
            loss = torch.nn.functional.cross_entropy(found(images)[0], labels)
        loss.backward()
        optimizer.step()
        wait()

    return call


def onnx_file(resolution: int, width: float, folder: Path, *, int8: bool = False) -> str:
    """Write the network as an ONNX file, unless it exists; int8 has ranges of noise, which do not change the time.

    Args:
      resolution: side of the images, in pixels.
      width: of the network.
      folder: for the file.
      int8: whether to compute in 8 bits.
    """
    import numpy as np
    import onnx

    from shufflenet_jax.config import TORCHVISION_EVAL
    from shufflenet_jax.exports import graph, quantization, runtime

    path = folder / f"{width}_{resolution}{'_int8' if int8 else ''}.onnx"
    if not path.exists():
        preprocess = dataclasses.replace(TORCHVISION_EVAL, resize=resolution, crop=resolution)
        common = (*converted(width, "float32", reference=False), preprocess)
        model, activations = graph.make_model(*common)
        if int8:
            noise = np.random.default_rng(1).normal(size=(8, 3, resolution, resolution)).astype("f4")
            ranges = quantization.calibrate(runtime.watch(model, activations), lambda: [noise])
            rounding = quantization.Quantization(ranges, 2 ** (runtime.weight_bits() - 1) - 1)
            model, _ = graph.make_model(*common, quantization=rounding)
        onnx.save(model, path)
    return str(path)


def onnx_inference(
    name: str, batch: int, _dtype: str, resolution: int, width: float, folder: Path, *, threads: int = 0
) -> Call:
    """Return the inference of ONNX Runtime, without arguments.

    Args:
      name: of the contender.
      batch: size of the batch.
      resolution: side of the images, in pixels.
      width: of the network.
      folder: for files.
      threads: number of threads; 0 means one per core.
    """
    import numpy as np
    import onnxruntime

    path = onnx_file(resolution, width, folder, int8=name.endswith("int8"))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(batch, 3, resolution, resolution)).astype("f4")
    return lambda: session.run(None, {"images": images})


def openvino_inference(name: str, batch: int, _dtype: str, resolution: int, width: float, folder: Path) -> Call:
    """Return the inference of OpenVINO, without arguments.

    Args:
      name: of the contender.
      batch: size of the batch.
      resolution: side of the images, in pixels.
      width: of the network.
      folder: for files.
    """
    import numpy as np
    import openvino

    precision = "bf16" if name.endswith("bfloat16") else "f32"
    network = openvino.convert_model(onnx_file(resolution, width, folder))
    network = openvino.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    images = np.random.default_rng(0).normal(size=(batch, 3, resolution, resolution)).astype("f4")
    return lambda: network(images)


if __name__ == "__main__":
    sys.exit(main())
