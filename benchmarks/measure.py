"""Run one command in a process of its own; say how long it took and how much memory it had.

The parent measures: time from start to exit, and from /proc (Linux) the memory of the process and of those
that it starts. A benchmark's child calls `stamp` when its imports are done and when its work is, so that
the work can be told from the interpreter's start.
"""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

IMPORTED: Final = "imported"
DONE: Final = "done"
_STAMPS: Final = "NLORA_SURGERY_BENCHMARK_STAMPS"  # environment variable: the file that stamps go to

_SAMPLE_SECONDS: Final = 0.01
_SAMPLES_PER_SEARCH: Final = 10  # how often it is looked for new child processes


@dataclass(frozen=True)
class Measurement:
    """What one run took.

    Attributes:
        wall_seconds: from the start of the process to its exit.
        work_seconds: from the child's stamp `IMPORTED` to its stamp `DONE`; None if it gave none.
        cpu_seconds: of all cores, user and system; if that is far below wall_seconds, something else had them.
        peak_rss_bytes: resident memory, mapped files included, at its highest; the sum of the processes'.
        peak_anonymous_bytes: of that what is not backed by a file, the most at one time in all processes.
        processes: how many there were.
    """

    wall_seconds: float
    work_seconds: float | None
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    processes: int


def stamp(event: str) -> None:
    """Tell the measuring parent, if there is one, that `event` happened now; under torchrun rank 0 does."""
    path = os.environ.get(_STAMPS)
    if path and os.environ.get("RANK", "0") == "0":
        now = time.monotonic()  # counts from the same moment in every process
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{event} {now}\n")


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measurement:
    """Run the command in the repository's root and measure it.

    Args:
        command: the program and its arguments.
        environment: variables to add to those of this process.

    Raises:
        RuntimeError: it failed; with the end of what it wrote to stderr.
    """
    with tempfile.TemporaryDirectory() as directory:
        stamps, errors = Path(directory) / "stamps", Path(directory) / "stderr"
        variables = {**os.environ, **(environment or {}), _STAMPS: str(stamps)}
        with open(errors, "wb") as stderr:
            start, cpu_start = time.monotonic(), _children_cpu_seconds()
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=stderr)
            memory = _Memory(process.pid)
            sampler = threading.Thread(target=memory.watch, daemon=True)
            sampler.start()
            try:
                code = process.wait()
                wall = time.monotonic() - start
            finally:
                process.terminate()  # on an interrupt, torchrun then ends its own; nothing to one that has ended
                process.wait()
                memory.stop.set()
                sampler.join()
        if code != 0:
            text = errors.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"exit code {code} of {' '.join(command)}\n{text}")
        times = dict(line.split() for line in stamps.read_text().splitlines()) if stamps.exists() else {}
    work = float(times[DONE]) - float(times[IMPORTED]) if IMPORTED in times and DONE in times else None
    return Measurement(
        wall,
        work,
        _children_cpu_seconds() - cpu_start,
        sum(memory.high_water.values()),
        memory.anonymous,
        len(memory.high_water),
    )


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended
    return usage.ru_utime + usage.ru_stime


@dataclass
class _Memory:
    """The peaks of a process and its descendants, sampled until `stop` is set."""

    pid: int
    high_water: dict[int, int] = field(default_factory=dict)  # by process: the kernel's own peak, not a sample
    anonymous: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        family = [self.pid]
        count = 0
        while not self.stop.wait(_SAMPLE_SECONDS):
            if count % _SAMPLES_PER_SEARCH == 0:
                family = _descendants(self.pid)
            count += 1
            anonymous = 0
            for pid in family:
                sizes = _status(pid)
                anonymous += sizes.get("RssAnon", 0)
                if "VmHWM" in sizes:
                    self.high_water[pid] = max(self.high_water.get(pid, 0), sizes["VmHWM"])
            self.anonymous = max(self.anonymous, anonymous)


def _status(pid: int) -> dict[str, int]:
    """The sizes in bytes that /proc tells of a process; none of one that has ended, or without /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _descendants(pid: int) -> list[int]:
    """The process and everything that it and its threads started."""
    family = [pid]
    for member in family:  # grows meanwhile
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                family += map(int, children.read_text().split())
            except OSError:
                continue  # that thread has ended
    return family
