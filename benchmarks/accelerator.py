"""Times of a training step, of inference, of the start of a command and of small images on a GPU.

    python benchmarks/accelerator.py --part step --json step.json
    python benchmarks/accelerator.py --part inference --checkpoint FILE.pth --data VAL650 --json inference.json

Contenders are ours, our reference lowering, and PyTorch with channels last: eager, torch.compile, and torch.compile
with CUDA graphs ("reduce-overhead"); all compute in bfloat16. Each has its own process. These compile side by side, and
are timed one at a time. Contenders that are not ready after `--minutes` are skipped with a note. A table goes to
stdout.

Parts: `step` (batches of 256 and 1,024; batch norm over groups of 64 and over all), `inference` (1, 32 and 256 images;
with `--checkpoint` and `--data` also eval.py's counts), `startup` (the first step of train.py with an empty compilation
cache and with a filled one), `cifar10` (steps of that preset). `--tiny` tries a part on a CPU.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from shufflenet_jax.config import TrainConfig

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

OURS, REFERENCE = "ours", "ours, reference lowering"
TORCH = {"PyTorch": None, "torch.compile": "default", "torch.compile, CUDA graphs": "reduce-overhead"}
GROUP = 64  # Examples that share batch statistics in the published run.
Call = Callable[[], object]
Row = dict[str, Any]  # {figure: number}.

# By default each process would allocate most of the GPU's memory at once.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Task(NamedTuple):
    """The measurements of a process.

    Attributes:
      part: "step", "cifar10" or "inference".
      contender: a key of TORCH, or one of ours.
      batches: sizes; an inference process measures them one after another.
      group: examples that share batch statistics; 0 means all.
      tiny: whether images are small, to try it on a CPU.
      seconds: measured time of each figure.
    """

    part: str
    contender: str
    batches: tuple[int, ...]
    group: int
    tiny: bool
    seconds: float


class Running(NamedTuple):
    """A process that measures.

    Attributes:
      task: its Task.
      process: the process.
      stdin: of the process.
      stdout: of the process.
      errors: the file of its stderr.
    """

    task: Task
    process: "subprocess.Popen[str]"
    stdin: IO[str]
    stdout: IO[str]
    errors: Path


class Torch(NamedTuple):
    """A network in PyTorch with channels last.

    Attributes:
      network: its module.
      compiled: the same, compiled if the contender compiles.
      device: where it is.
      autocast: arguments of torch.autocast.
      wait: waits for the device.
    """

    network: "torch.nn.Module"
    compiled: "torch.nn.Module"
    device: str
    autocast: dict[str, Any]
    wait: Call


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["step", "inference", "startup", "cifar10"], default="step")
    parser.add_argument("--only", nargs="*", help="contenders to run (default: all)")
    parser.add_argument("--checkpoint", help="weights for the counts of eval.py, in any form")
    parser.add_argument("--data", help="images for the counts of eval.py")
    parser.add_argument("--seconds", type=float, default=3, help="measured time of each figure (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.5, help="time to compile (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="few small images, to try a part on a CPU")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(Task(**json.loads(options.child)))

    from model import machine

    print(f"{machine()}; bfloat16, 1.0x\n")
    if options.part == "startup":
        figures = startup(tiny=options.tiny)
    else:
        results = measure(tasks_of(options), time.monotonic() + 60 * options.minutes)
        show(results)
        figures = [task._asdict() | row for task, rows in results for row in rows]
    if options.part == "inference" and options.checkpoint and options.data:
        figures += counts(options.checkpoint, options.data)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "part": options.part, "rows": figures}, indent=2))
    return 0


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """Return the tasks of a part, those that take longest to compile first.

    Args:
      options: of the command line.
    """
    names = [name for name in (OURS, REFERENCE, *TORCH) if options.only is None or name in options.only]
    batches: list[tuple[int, ...]]
    if options.part == "inference":
        batches = [(1, 2) if options.tiny else (1, 32, 256)]
    elif options.part == "cifar10":
        batches = [(8,) if options.tiny else (256,)]
    else:
        batches = [(8,)] if options.tiny else [(256,), (1024,)]
    groups = (GROUP, 0) if options.part == "step" and not options.tiny else (0,)
    tasks = [
        Task(options.part, name, sizes, group, options.tiny, options.seconds)
        for sizes, group, name in itertools.product(batches, groups, names)
        # PyTorch has no groups on one GPU; the reference lowering is too slow for large batches.
        if not (group and name in TORCH) and not (name == REFERENCE and sizes[0] > 256)
    ]
    return sorted(tasks, key=lambda task: task.contender != REFERENCE)


def measure(tasks: Sequence[Task], deadline: float) -> list[tuple[Task, list[Row]]]:
    """Return the figures of the tasks that were ready in time.

    Args:
      tasks: to run.
      deadline: when they must be ready, by time.monotonic().
    """
    running = list(map(start, tasks))
    ready: dict[Task, str] = {}

    def await_ready(run: Running) -> None:
        ready[run.task] = run.stdout.readline()

    waiting = [threading.Thread(target=await_ready, args=(run,), daemon=True) for run in running]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(max(0, deadline - time.monotonic()))
    results = []
    for task, process, stdin, stdout, errors in running:
        line = ready.get(task, "")
        if line.startswith("ready"):
            stdin.write("go\n")
            stdin.flush()
            rows = stdout.readline()
            results += [(task, json.loads(rows))] if rows.startswith("[") else []
            line = "" if not rows.startswith("[") else line
        process.kill()
        if not line.startswith("ready"):
            reason = errors.read_text()[-500:] if task in ready else "it was not ready in time"
            print(f"note: {task.contender}, {task.batches}, is skipped: {reason}", file=sys.stderr)
    return results


def start(task: Task) -> Running:
    """Start the process of a task.

    Args:
      task: to run.
    """
    errors = tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False)  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(task._asdict())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **SHARED},
    )
    assert process.stdin and process.stdout  # Both are pipes.
    return Running(task, process, process.stdin, process.stdout, Path(errors.name))


def child(task: Task) -> int:
    """Compile, report it, wait for a line, and print [{"batch", "milliseconds", "memory": peak in MiB}].

    Args:
      task: to run.

    Returns:
      The exit status.
    """
    task = task._replace(batches=tuple(task.batches))
    began = time.perf_counter()
    build = inference if task.part == "inference" else step
    calls = {batch: build(task, batch) for batch in task.batches}
    for call in calls.values():
        for _ in range(3):
            call()
    compiled = time.perf_counter() - began
    print("ready", flush=True)
    sys.stdin.readline()
    rows = []
    for batch, call in calls.items():
        milliseconds = 1e3 * statistics.median(times_of(call, task.seconds))
        rows.append({"batch": batch, "milliseconds": milliseconds, "memory": peak_memory(), "compiled": compiled})
    print(json.dumps(rows), flush=True)
    return 0


def times_of(call: Call, seconds: float) -> list[float]:
    """Return the seconds of each of many calls, which wait for the device.

    Args:
      call: to time.
      seconds: time of measuring.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def peak_memory() -> float | None:
    """Return the peak memory on the GPU in MiB, or None."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    if "jax" in sys.modules:
        statistics = sys.modules["jax"].local_devices()[0].memory_stats() or {}
        return statistics.get("peak_bytes_in_use", 0) / 2**20 or None
    return None


def config_of(task: Task, batch: int) -> "TrainConfig":
    """Return the settings of a training step.

    Args:
      task: to run.
      batch: size of the batch.
    """
    from shufflenet_jax.recipes import PRESETS

    side = 32 if task.part == "cifar10" or task.tiny else 224
    changes: dict[str, Any] = {"batch_size": batch, "bn_group_size": task.group, "accumulate": 1, "image_size": side}
    return dataclasses.replace(PRESETS["cifar10" if task.part == "cifar10" else "in1k"], dtype="bfloat16", **changes)


def step(task: Task, batch: int) -> Call:
    """Return a training step of a contender, without arguments.

    Args:
      task: to run.
      batch: size of the batch.
    """
    config = config_of(task, batch)
    classes = 10 if config.small_stem else 1000
    if task.contender in TORCH:
        return torch_step(task, config, classes)
    from model import training_step

    from shufflenet_jax.model import ShuffleNetV2, init_variables

    lowering = "reference" if task.contender == REFERENCE else "auto"
    module = ShuffleNetV2(num_classes=classes, small_stem=config.small_stem, dtype=config.dtype, lowering=lowering)
    return training_step(module, init_variables(module), config)


def inference(task: Task, batch: int) -> Call:
    """Return the inference of a contender, without arguments.

    Args:
      task: to run.
      batch: size of the batch.
    """
    side = 32 if task.tiny else 224
    if task.contender in TORCH:
        return torch_inference(task, batch, side)
    from model import jax_inference

    return jax_inference(task.contender, batch, "bfloat16", side, 1.0, None)


def torch_network(task: Task, classes: int, *, small_stem: bool = False) -> Torch:
    """Return the network of a contender in PyTorch.

    Args:
      task: to run.
      classes: of the network.
      small_stem: of the network.
    """
    import torch

    from shufflenet_jax.architecture import TABLES
    from shufflenet_jax.porting.reference import NETWORKS

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = NETWORKS["torchvision"](TABLES[1.0], classes, small_stem=small_stem)
    network = network.to(device, memory_format=torch.channels_last)
    mode = TORCH[task.contender]
    compiled = torch.compile(network, mode=mode) if mode else network
    autocast = {"device_type": device, "dtype": torch.bfloat16}
    return Torch(network, compiled, device, autocast, torch.cuda.synchronize if device == "cuda" else lambda: None)


def torch_step(task: Task, config: "TrainConfig", classes: int) -> Call:
    """Return a training step in PyTorch.

    Args:
      task: to run.
      config: the settings.
      classes: of the network.
    """
    import torch

    network, compiled, device, autocast, wait = torch_network(task, classes, small_stem=config.small_stem)
    network.train()
    settings = {"momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.weight_decay}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, **settings)
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    labels = torch.randint(0, classes, shape[:1], device=device)

    def call() -> None:
        optimizer.zero_grad()
        images = (pixels.float() - 120) / 58  # Still channels last.
        with torch.autocast(**autocast):
            loss = torch.nn.functional.cross_entropy(compiled(images)[0], labels)
        loss.backward()
        optimizer.step()
        wait()

    return call


def torch_inference(task: Task, batch: int, side: int) -> Call:
    """Return the inference in PyTorch.

    Args:
      task: to run.
      batch: size of the batch.
      side: of the images, in pixels.
    """
    import torch

    network, compiled, device, autocast, wait = torch_network(task, 1000)
    network.eval()
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)

    def call() -> None:
        with torch.inference_mode(), torch.autocast(**autocast):
            compiled(images)
        wait()

    return call


def show(results: Iterable[tuple[Task, list[Row]]]) -> None:
    """Print a row for each figure, with the ratio of our time to theirs for the same batch and group.

    Args:
      results: from `measure`.
    """
    results = list(results)
    ours = {
        (row["batch"], task.group): row["milliseconds"]
        for task, rows in results
        for row in rows
        if task.contender == OURS
    }
    print("| contender | batch | groups of | ms | images/s | our time / theirs | peak memory, MiB | ready after, s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for task, rows in sorted(results, key=lambda pair: (pair[0].batches, pair[0].group)):
        for row in rows:
            mine = ours.get((row["batch"], task.group))
            ratio = f"{mine / row['milliseconds']:.2f}" if mine else ""
            memory = f"{row['memory']:.0f}" if row["memory"] else ""
            print(
                f"| {task.contender} | {row['batch']} | {task.group or 'all'} | {row['milliseconds']:.2f} | "
                f"{1e3 * row['batch'] / row['milliseconds']:,.0f} | {ratio} | {memory} | {row['compiled']:.0f} |"
            )


def startup(*, tiny: bool) -> list[Row]:
    """Print and return the seconds to the first step of train.py, and the files in the compilation cache then.

    Args:
      tiny: whether images are small and few.
    """
    from startup import first_step, save_images

    batch = 8 if tiny else 256
    words: list[object] = ["train.py", "--config", "in1k", "--batch-size", batch, "--bn-group-size", min(GROUP, batch)]
    words += ["--log-every", 1, "--dtype", "bfloat16", *(["--image-size", 32] if tiny else [])]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as home:
        folder = save_images(Path(home), batch)
        cache = Path(home) / "cache"
        print("| compilation cache | seconds to the first step |\n| --- | --- |")
        for kind in ("empty", "filled"):
            place = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
            seconds = first_step([*words, "--data", folder, "--workdir", f"{home}/{kind}"], place)
            files = [path for path in cache.rglob("*") if path.is_file()]
            tuned = sum("autotune" in str(path.relative_to(cache)) for path in files)
            print(f"| {kind} | {seconds:.1f} |")
            rows.append({"cache": kind, "seconds": seconds, "files": len(files), "of autotuning": tuned})
    print(f"\n{rows[-1]['files']} files in the cache, {rows[-1]['of autotuning']} of them results of autotuning")
    return rows


def counts(checkpoint: str, data: str) -> list[Row]:
    """Print and return the counts of eval.py; if it fails, print a note and return no row.

    Args:
      checkpoint: its name or path.
      data: the images.
    """
    words = [sys.executable, "eval.py", "--checkpoint", checkpoint, "--data", data]
    done = subprocess.run([*words], cwd=ROOT, env={**os.environ, **SHARED}, capture_output=True, text=True)
    if done.returncode:
        print(f"note: eval.py failed: {done.stderr[-2000:]}", file=sys.stderr)
        return []
    counted = json.loads(done.stdout.splitlines()[-1])
    print(f"\neval.py: {counted['top1_correct']} and {counted['top5_correct']} of {counted['images']}")
    return [counted]


if __name__ == "__main__":
    sys.exit(main())
