"""The effect of a teacher: 0.5x students of a 1.0x teacher beside the same trainings without it, over several seeds.

    python benchmarks/distillation.py [--config digits] [--data D --data-dir DIR] [--epochs N] [--teacher-epochs N]

Every training is a run of train.py, in teacher, alone-SEED and taught-SEED below --out; finished runs are not repeated.
A table of the last accuracies goes to stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="preset of all trainings (default: %(default)s)")
    parser.add_argument("--data", help="as train.py takes it (default: the preset's)")
    parser.add_argument("--data-dir", help="folder of tfds: data sets")
    parser.add_argument("--out", default="runs/distillation", help="folder of the trainings (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of each student (default: %(default)s)")
    parser.add_argument("--teacher-epochs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of students of each kind (default: %(default)s)")
    options = parser.parse_args()

    from model import machine

    out = Path(options.out)
    teacher = train(options, out / "teacher", "--width", 1.0, "--epochs", options.teacher_epochs)
    results: dict[str, list[float]] = {"alone": [], "taught": []}
    for seed in range(options.seeds):
        for kind, accuracies in results.items():
            words: list[object] = ["--teacher", out / "teacher"] if kind == "taught" else []
            words += ["--width", 0.5, "--epochs", options.epochs, "--seed", seed]
            accuracies.append(train(options, out / f"{kind}-{seed}", *words))
    print(f"{machine()}; {options.config}, {options.epochs} epochs; the 1.0x teacher has {teacher:.2f} %\n")
    print("| 0.5x, top-1 in % | " + " | ".join(f"seed {seed}" for seed in range(options.seeds)) + " | mean |")
    print("| --- " * (options.seeds + 2) + "|")
    for kind, accuracies in results.items():
        print(f"| {kind} | " + " | ".join(f"{a:.2f}" for a in (*accuracies, statistics.mean(accuracies))) + " |")
    return 0


def train(options: argparse.Namespace, workdir: Path, *words: object) -> float:
    """Train, and return the last top-1 accuracy.

    Args:
      options: of the command line.
      workdir: folder of the run.
      words: other arguments of train.py.
    """
    command: list[object] = [
        sys.executable,
        ROOT / "train.py",
        "--config",
        options.config,
        "--workdir",
        workdir,
        *words,
    ]
    for name in ("data", "data_dir"):
        if getattr(options, name):
            command += [f"--{name.replace('_', '-')}", getattr(options, name)]
    subprocess.run(list(map(str, command)), check=True)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["top1"] for row in rows if row["split"] == "eval"][-1]


if __name__ == "__main__":
    sys.exit(main())
