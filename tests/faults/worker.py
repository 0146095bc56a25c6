"""A process that runs commands: `worker.py run ARGV` one of them, `worker.py serve` one for each line of JSON on stdin.

Networks have few units; memory is limited, so that whoever takes too much fails here and nowhere else.
"""

import faulthandler
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from small_training import few_units

from shufflenet_jax.__main__ import main
from shufflenet_jax.commands import console

MEMORY = 4 << 30  # Bytes.


def outcome_of(argv):
    """The exit status that a process would have; what ends it otherwise is printed as Python does."""
    try:
        return console.run(main, argv)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def memory_of(field):
    """A figure of this process in bytes: VmHWM is the most it held, VmRSS what it holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def execute(argv, cwd, stdout, stderr):
    """Runs a command in a folder, with what it prints in two files. Returns {"status", "peak", "held"}."""
    os.chdir(cwd)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew from here.
    kept = os.dup(1), os.dup(2)
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    try:
        status = outcome_of(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, file in zip((1, 2), kept, strict=True):
            os.dup2(file, number)
            os.close(file)
    return {"status": status, "peak": memory_of("VmHWM"), "held": memory_of("VmRSS")}


def serve():
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    faulthandler.enable(os.dup(2))
    faulthandler.register(signal.SIGUSR1, os.dup(2))  # The parent asks so where a command hangs.
    for line in requests:
        print(json.dumps(execute(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with few_units():
        if sys.argv[1] == "serve":
            serve()
        else:
            sys.exit(outcome_of(sys.argv[2:]))
