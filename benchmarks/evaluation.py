"""Images per second of an evaluation, from files to counts: eval.py's code beside channels-last PyTorch.

    python benchmarks/evaluation.py --checkpoint FILE.pth --data FOLDER [FOLDER ...]

Both decode and resize with the same functions. PyTorch reads through a DataLoader with one worker per core, and
predicts as is usual: eager, channels last, in inference mode. Every run is a separate process; the contenders
alternate, several times. A first pass over the data warms up, the second one counts. A table of medians goes to stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a PyTorch file of any dialect")
    parser.add_argument("--data", nargs="+", required=True, help="folders of images, as eval.py takes them")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--child", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = {"ours": ours, "peer": peer}[options.child]
        print(json.dumps(run(options.checkpoint, options.data[0])))
        return 0

    from model import machine

    print(f"{machine()}; images per second, median of {options.rounds} alternating runs\n")
    print("| data | images | ours | PyTorch, channels last | ratio |\n| --- | --- | --- | --- | --- |")
    for data in options.data:
        results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(options.rounds):
            for name, runs in results.items():
                words = [sys.executable, __file__, "--checkpoint", options.checkpoint, "--data", data, "--child", name]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"error: {name} failed: {done.stderr.strip()[-2000:]}")
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        assert len({run["top1_correct"] for runs in results.values() for run in runs}) == 1, results
        fast, slow = (statistics.median(run["rate"] for run in runs) for runs in results.values())
        print(f"| {Path(data).name} | {results['ours'][0]['images']} | {fast:.0f} | {slow:.0f} | {fast / slow:.2f} |")
    return 0


def ours(checkpoint: str, data: str) -> dict[str, Any]:
    """Run our evaluation.

    Args:
      checkpoint: a PyTorch file.
      data: a folder of images.

    Returns:
      {"images", "rate": images per second, "top1_correct"}.
    """
    from functools import partial

    from shufflenet_jax import environment, parallel
    from shufflenet_jax.commands.evaluate import CPU_BATCH
    from shufflenet_jax.data.pipeline import eval_batches
    from shufflenet_jax.data.sources import open_source
    from shufflenet_jax.deploy import deploy
    from shufflenet_jax.evaluation.counting import eval_step, evaluate
    from shufflenet_jax.loading import load_model

    environment.enable_compilation_cache()  # As `console.run` does for every command.
    environment.keep_freed_memory()
    module, variables, info = load_model(checkpoint)
    source = open_source(data, classes=info.classes, num_classes=info.num_classes)
    deployed, weights = deploy(module, variables)
    step = parallel.map_eval_step(partial(eval_step, deployed, info.preprocess))
    weights = parallel.replicate(weights)

    def once() -> dict[str, Any]:
        return evaluate(step, weights, eval_batches(source, info.preprocess, batch_size=CPU_BATCH))[0]

    return timed(once, len(source))


def peer(checkpoint: str, data: str) -> dict[str, Any]:
    """Run the evaluation in PyTorch.

    Args:
      checkpoint: a PyTorch file.
      data: a folder of images.

    Returns:
      {"images", "rate": images per second, "top1_correct"}.
    """
    import torch

    from shufflenet_jax.data import geometry
    from shufflenet_jax.data.sources import open_source
    from shufflenet_jax.porting import convert, reference

    file = convert.read(checkpoint)
    conversion = convert.convert(file)
    info, preprocess = conversion.info, conversion.info.preprocess
    network = reference.NETWORKS[conversion.dialect](info.table, info.num_classes)
    network.load_state_dict(
        {key: torch.from_numpy(value.copy()) for key, value in conversion.tensors.items()}, strict=False
    )
    network = network.eval().to(memory_format=torch.channels_last)
    source = open_source(data, classes=info.classes, num_classes=info.num_classes)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            example = source[index]
            pixels = geometry.prepare(example.image, preprocess, example.name)
            return torch.from_numpy(pixels.copy()), int(example.label)

    loader = torch.utils.data.DataLoader(
        Images(), batch_size=32, num_workers=len(os.sched_getaffinity(0)), persistent_workers=True
    )

    def once() -> dict[str, Any]:
        correct = 0
        with torch.inference_mode():
            for pixels, labels in loader:
                images = (pixels.permute(0, 3, 1, 2) * preprocess.scale - mean) / std
                correct += int((network(images)[0].argmax(1) == labels).sum())
        return {"top1_correct": correct}

    return timed(once, len(source))


def timed(once: Callable[[], Mapping[str, Any]], images: int) -> dict[str, Any]:
    """Time the second call of an evaluation.

    Args:
      once: evaluates all images.
      images: their number.
    """
    once()
    start = time.perf_counter()
    figures = once()
    return {"images": images, "rate": images / (time.perf_counter() - start), "top1_correct": figures["top1_correct"]}


if __name__ == "__main__":
    sys.exit(main())
