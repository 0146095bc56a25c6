"""Runs cases under limits of time and memory, and holds each answer to one rule.

A right result, or one `error:` line and status 2; no traceback, no hang, not too much memory, nothing outside the
output folder, no changed input.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .kinds import kind_of, make_case
from .originals import Originals, tree_of

SCRIPT = Path(__file__).with_name("worker.py")
SECONDS = 20  # A command may take.
WARMING = 300  # A worker may take to import and trace what later commands find ready, beside other work.
STARTING = 60  # A process may take besides, to import and to compile.
MEMORY = 4 << 30  # Bytes it may hold.
LASTING = 2 << 30  # A worker that holds more between two commands is replaced.
READ = 100_000  # Characters of what it prints.
REPORTS = ("error: ", "warning: ", "skipped: ", "no splits in ")  # What every command may say.


class Answer(NamedTuple):
    """What came of a command; a status below 0 is the signal that ended it, None a hang."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float
    peak: int  # Bytes.


class Finding(NamedTuple):
    """A case, and how it broke the rule, if it did."""

    index: int
    kind: str
    argv: list
    told: str
    answer: Answer
    faults: list

    def __str__(self):
        words = " ".join(self.argv)
        return f"CASE={self.index} ({self.kind}): {self.told}\n  {words}\n  " + "\n  ".join(self.faults)


class Worker:
    """A process that runs commands one after another, started anew after whatever ended it."""

    def __init__(self, folder, *, seconds=SECONDS):
        self.folder, self.seconds, self._process = folder, seconds, None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def __call__(self, argv, cwd, *, seconds=None):
        """Run a command in a folder, in so many seconds at most; return its Answer."""
        if self._process is None:
            self._start()
        stdout, stderr = self.folder / "stdout", self.folder / "stderr"
        request = {"argv": list(argv), "cwd": str(cwd), "stdout": str(stdout), "stderr": str(stderr)}
        began = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # It has ended; that is found below.
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], self.seconds if seconds is None else seconds)
        line = self._process.stdout.readline() if ready else b""
        seconds = time.monotonic() - began
        if line:
            answer = json.loads(line)
            if answer["held"] > LASTING:
                self._end()
            return Answer(answer["status"], _read(stdout), _read(stderr), seconds, answer["peak"])
        if not ready:  # It tells where it hangs.
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        status = None if not ready else self._process.wait()
        self._end()
        return Answer(status, _read(stdout), _read(stderr) + _read(self.folder / "log"), seconds, 0)

    @property
    def pid(self):
        return self._process.pid

    def _start(self):
        with open(self.folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, SCRIPT, "serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(self.folder),
            )
        first = self(["models"], self.folder, seconds=WARMING)
        assert first.status == 0, first

    def _end(self):
        if self._process:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None


class NotStartable(Exception):
    """The system starts no program with an argument that holds a null byte or cannot be encoded."""


def _can_be_passed(word):
    """Whether a program can be started with an argument."""
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


def in_a_process(folder, *, seconds=STARTING + SECONDS):
    """A function like a Worker that runs each command in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)

    def run(argv, cwd):
        if not all(map(_can_be_passed, argv)):
            raise NotStartable
        began = time.monotonic()
        stdout, stderr = folder / "stdout", folder / "stderr"
        with open(stdout, "wb") as out, open(stderr, "wb") as err:
            process = subprocess.Popen(
                [sys.executable, SCRIPT, "run", *argv], stdout=out, stderr=err, cwd=cwd, env=_environment(folder)
            )
            status, peak = _waited(process, began + seconds)
        return Answer(status, _read(stdout), _read(stderr), time.monotonic() - began, peak)

    return run


def _waited(process, until):
    """(exit status or None, most memory in bytes) of a process, ended at a moment at the latest."""
    while time.monotonic() < until:
        number, status, usage = os.wait4(process.pid, os.WNOHANG)
        if number:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_maxrss << 10
        time.sleep(0.02)
    process.kill()
    process.wait()
    return None, 0


def _environment(folder):
    """Of a worker: one device, and a cache of its own except for compiled programs."""
    own = {"SHUFFLENET_JAX_CACHE": folder / "cache", "TMPDIR": folder / "tmp", "HOME": folder / "home"}
    for path in own.values():
        path.mkdir(exist_ok=True)
    return os.environ | {name: str(path) for name, path in own.items()} | {"JAX_NUM_CPU_DEVICES": "1"}


def _read(path):
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        return file.read(READ).decode(errors="replace")


def faults_of(case, answer, before, after):
    """How an answer breaks the rule, by what lay in the case's folder before and after; [] if it does not."""
    faults = []
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    others = [line for line in answer.stderr.splitlines() if line.strip() and not line.startswith(REPORTS)]
    if answer.status is None:
        faults.append(f"it hangs: {answer.stderr[-3000:]}")
    elif "Traceback" in answer.stderr + answer.stdout:
        faults.append(f"status {answer.status} and a traceback: {answer.stderr[-3000:]}")
    elif answer.status not in case.statuses:
        faults.append(f"status {answer.status}: {answer.stderr[-3000:]}")
    elif answer.status == 2 and not 1 <= len(errors) <= case.images:
        faults.append(f"{len(errors)} error lines: {answer.stderr[-1000:]}")
    elif answer.status != 2 and errors:
        faults.append(f"an error, but status {answer.status}: {errors}")
    elif others and not case.talks:
        faults.append(f"other words on stderr: {others[:3]}")
    if answer.peak > MEMORY:
        faults.append(f"{answer.peak >> 20} MiB of memory")
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    outside = sorted(path for path in changed if not path.startswith("out/"))
    if outside:
        faults.append(f"changed outside the output folder: {outside[:5]}")
    left = [path for path in sorted(changed - set(outside)) if not _matches(path, case.may_change)]
    if left and answer.status not in (0, 1):
        faults.append(f"left behind: {left[:5]}")
    return faults


def _matches(path, patterns):
    return any(re.fullmatch(f"out/(?:{pattern})", path) for pattern in patterns)


def run_case(seed, index, kind, folder, originals, runner):
    """Makes a case below a folder, runs it and judges it; returns a Finding. The folder is removed."""
    kind = kind or kind_of(seed, index)
    place = folder / f"case-{index}"
    try:
        case = make_case(seed, index, kind, place, originals)
        before = tree_of(place)
        answer = runner(case.argv, place / "cwd")
        faults = faults_of(case, answer, before, tree_of(place))
        if answer.status == 0 and not faults:
            faults = case.right(answer, lambda *argv: runner([str(word) for word in argv], place / "cwd"))
        return Finding(index, kind, case.argv, case.told, answer, faults)
    finally:
        shutil.rmtree(place)


class Run:
    """Cases of a seed, in some persistent workers at a time."""

    def __init__(self, folder, seed, *, workers=1):
        self.folder, self.seed = Path(folder), seed
        self._workers = [Worker(self.folder / f"worker{i}") for i in range(workers)]
        self._free = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._maker = Worker(self.folder / "maker", seconds=10 * STARTING)
        self.originals = Originals(self.folder / "originals", self._make)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in (self._maker, *self._workers):
            worker.__exit__()

    def _make(self, *argv):
        answer = self._maker([str(word) for word in argv], self.folder)
        assert answer.status == 0, answer
        return answer

    def findings(self, indices):
        """The Finding of each case, as they come."""
        with ThreadPoolExecutor(len(self._workers)) as pool:
            yield from pool.map(self.finding, indices)

    def finding(self, index, kind=None):
        """The Finding of a case, of a kind, or of that which the seed draws for its index."""
        worker = self._free.get()
        try:
            return run_case(self.seed, index, kind, worker.folder, self.originals, worker)
        finally:
            self._free.put(worker)

    def findings_in_processes(self, indices):
        """The same, each in a process of its own; in a worker where its arguments can reach no process."""
        folders = (self.folder / f"process{i}" for i in itertools.count())

        def one(index, folder):
            with contextlib.suppress(NotStartable):
                return run_case(self.seed, index, None, folder, self.originals, in_a_process(folder))
            return self.finding(index)

        with ThreadPoolExecutor(len(self._workers)) as pool:
            yield from pool.map(one, indices, folders)
