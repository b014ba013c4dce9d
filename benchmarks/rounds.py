"""What benchmarks of commands share: cases, the rounds in which they alternate, and the table.

Every run is a process of its own, started with its inputs in the page cache; its output is deleted after it.
The cases alternate in rounds (A B C A B C …), so that whatever else the machine does meets all of them. What
would take most of the time of a benchmark, exact SVDs of every weight, runs on checkpoints of one and of two
layers, and what the second layer adds counts for every further one.

On a file system that shares extents (btrfs, XFS), `cp` copies nothing, and ratios to it say little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import ROOT, Measurement, measure
from benchmarks.synthetic import LAYERS

OUTPUT: Final = "out"

_OFFLINE: Final = {"HF_HUB_OFFLINE": "1"}
_PACKAGES: Final = ("torch", "transformers", "peft", "safetensors")
_EXTRAPOLATED_FROM: Final = (1, 2)  # layers
_QUICK_LAYERS: Final = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table; a benchmark derives its own kinds from it.

    Attributes:
        name: for --cases, and unique.
        title: for the table.
        kind: `copy`; `import` only imports torch, the baseline of the memory; or a benchmark's own.
        layers: of the checkpoint.
        arguments: for the command line of `kind`.
        most_rounds: where a run takes so long that the other cases get more rounds; None has all of them.
        extrapolated: whether it runs on the shallow checkpoints instead.
        yardstick: name of the case to which its time after the imports is related.
    """

    name: str
    title: str
    kind: str
    layers: int
    arguments: tuple[str, ...] = ()
    most_rounds: int | None = None
    extrapolated: bool = False
    yardstick: str | None = None

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths of the checkpoints that it runs on."""
        return _EXTRAPOLATED_FROM if self.extrapolated and self.layers > max(_EXTRAPOLATED_FROM) else (self.layers,)

    def inputs(self, data: Path, layers: int) -> list[Path]:
        """The directories that it reads at that depth, built where they are missing; the checkpoint comes first."""
        return [checkpoint(data, layers)]

    def command(self, inputs: Sequence[Path], out: Path) -> list[str]:
        """The program and its arguments."""
        if self.kind == "copy":
            return ["cp", "-r", str(inputs[0]), str(out)]
        if self.kind == "import":
            return [sys.executable, "-c", "import torch"]
        raise NotImplementedError(self.kind)


def limits(layers: int) -> list[Case]:
    """The two cases that every table has: what Python itself takes, and what copying does."""
    return [
        Case(name="python", title="python, import torch", kind="import", layers=layers),
        Case(name="cp", title="cp -r", kind="copy", layers=layers),
    ]


@dataclass(frozen=True)
class Run:
    """One measured run of a case."""

    round: int
    layers: int
    measured: Measurement


# --- running ---------------------------------------------------------------------------------------------


def checkpoint(data: Path, layers: int) -> Path:
    """The checkpoint of that depth, built if it is not there."""
    directory = data / f"llama-{layers}-layers"
    built(directory, "-m", "benchmarks.synthetic", directory, "--layers", layers)
    return directory


def built(directory: Path, *arguments: object) -> None:
    """Have Python make a directory if it is not there (in a process of its own: this one stays small)."""
    if not directory.exists():
        say(f"building {directory.name}")
        command = [sys.executable, *map(str, arguments)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env={**os.environ, **_OFFLINE})


def run_once(case: Case, data: Path, layers: int) -> Measurement:
    """One run, from a warm page cache, with nothing of an earlier run still to be written to the disk."""
    inputs = case.inputs(data, layers)
    for directory in inputs:
        _read_all(directory)
    os.sync()
    with tempfile.TemporaryDirectory(prefix="run-", dir=data) as directory:
        measured = measure(case.command(inputs, Path(directory) / OUTPUT), _OFFLINE)
    if case.kind == "copy":  # which has nothing to import
        measured = replace(measured, work_seconds=measured.wall_seconds)
    return measured


def run_rounds(
    cases: Sequence[Case], data: Path, rounds: int, after_round: Callable[[dict[str, list[Run]]], None]
) -> dict[str, list[Run]]:
    """All cases, alternating.

    Args:
        cases: to run.
        data: the directory of the inputs, and of the outputs while they exist.
        rounds: how many times each case runs, unless it has a limit of its own.
        after_round: called with what there is.

    Returns:
        The runs of each case, by its name.
    """
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    for case in cases:
        for layers in case.depths:
            case.inputs(data, layers)
    for index in range(rounds):
        for case in cases:
            if case.most_rounds is not None and index >= case.most_rounds:
                continue
            for layers in case.depths:
                measured = run_once(case, data, layers)
                runs[case.name].append(Run(index, layers, measured))
                where = f" on {layers} layers" if case.depths != (case.layers,) else ""
                say(f"round {index + 1} of {rounds}: {case.title}{where}: {measured.wall_seconds:.2f} s")
        after_round(runs)
    return runs


def _read_all(directory: Path) -> None:
    buffer = bytearray(8 << 20)
    for path in directory.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


# --- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A case's runs in figures: seconds of every round, peaks over all; None for what was not measured."""

    wall: list[float]
    work: list[float]
    rss_bytes: int | None
    anonymous_bytes: int | None


def summarize(case: Case, runs: Sequence[Run]) -> Summary:
    """The figures of one case, extrapolated to its depth where it ran on fewer layers.

    Memory is not extrapolated: it was not measured at that depth.
    """
    by_round: dict[int, list[Measurement]] = {}
    for run in runs:
        by_round.setdefault(run.round, []).append(run.measured)
    if len(case.depths) == 1:
        measured = [run.measured for run in runs]
        work = [one.work_seconds for one in measured if one.work_seconds is not None]
        return Summary(
            [one.wall_seconds for one in measured],
            work,
            max((one.peak_rss_bytes for one in measured), default=0) or None,
            max((one.peak_anonymous_bytes for one in measured), default=0) or None,
        )
    pairs = [pair for pair in by_round.values() if len(pair) == len(case.depths)]
    return Summary(
        [_extrapolate(case.layers, *(one.wall_seconds for one in pair)) for pair in pairs],
        [_extrapolate(case.layers, *(one.work_seconds or 0.0 for one in pair)) for pair in pairs],
        None,
        None,
    )


def _extrapolate(layers: int, one_layer: float, two_layers: float) -> float:
    return one_layer + (two_layers - one_layer) * (layers - 1)


def table(cases: Sequence[Case], runs: Mapping[str, Sequence[Run]], yardstick: str, legend: str) -> str:
    """The Markdown table of what was measured, and below it what its columns mean.

    Args:
        cases: the rows.
        runs: of each case, by its name.
        yardstick: what the cases' yardsticks are called in the header.
        legend: what the column below it holds.
    """
    figures = {case.name: summarize(case, runs[case.name]) for case in cases}
    copied = {case.layers: figures[case.name].wall for case in cases if case.kind == "copy"}
    baseline = next((figures[case.name].anonymous_bytes for case in cases if case.kind == "import"), None) or 0

    header = [
        "case", "rounds", "wall s, median (min–max)", "÷ cp",
        "s after imports", f"÷ {yardstick}", "peak RSS MB", "peak anonymous MB",
    ]  # fmt: skip
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for case in cases:
        summary = figures[case.name]
        anonymous = summary.anonymous_bytes
        if anonymous is not None and case.kind != "copy":
            anonymous = max(0, anonymous - baseline * runs[case.name][0].measured.processes)
        note = f" from {' and '.join(map(str, case.depths))} layers" if len(case.depths) > 1 else ""
        wall = _median(summary.wall)
        spread = f" ({min(summary.wall):.2f}–{max(summary.wall):.2f})" if summary.wall else ""
        related = figures[case.yardstick].work if case.yardstick in figures else []
        cells = [
            case.title,
            f"{len(summary.wall)}{note}",
            _figure(wall, ".2f") + spread,
            _figure(_ratio(wall, _median(copied.get(case.layers, []))), ".2f"),
            _figure(_median(summary.work), ".2f"),
            _figure(_ratio(_median(summary.work), _median(related)), ".2f"),
            _figure(_megabytes(summary.rss_bytes), ",.0f"),
            _figure(_megabytes(anonymous), ",.0f"),
        ]
        lines.append(_row(cells))
    ratios = f"÷ cp: wall time to that of `cp -r`, at the same depth. ÷ {yardstick}: {legend}"
    return "\n".join([*lines, "", ratios, _LEGEND])


_LEGEND: Final = """\
Peak RSS counts mapped files, and what processes share once for each. Peak anonymous memory is above that of a
Python that has imported torch (`cp`: as it is)."""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# --- the machine, the command line -------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cores": cores,
        "processor": processor,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg(),
        "versions": versions,
    }


def _machine_line(facts: dict[str, Any], options: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['cores']} cores of {facts['processor']}, {facts['memory_bytes'] / 1e9:.0f} GB, {facts['system']}; "
        f"{versions}. Load at the start {facts['load'][0]:.1f}. {options.layers} layers, rank {options.rank}."
    )


def positive(text: str) -> int:
    """An option's value that is a positive number."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def command_line(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark; `settled` fills their defaults in."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, help="of every case; slow ones have fewer  [5, with --quick 2]")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="only these, by name, comma-separated")
    parser.add_argument("--layers", type=positive, help=f"of the checkpoint  [{LAYERS}, with --quick {_QUICK_LAYERS}]")
    parser.add_argument("--rank", type=positive, default=64, help="[%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few layers, few rounds, no exact SVD")
    parser.add_argument("--data", type=Path, default=ROOT / "bench-data", help="inputs and outputs  [bench-data]")
    parser.add_argument("--json", type=Path, help="file for the single measurements, written after every round")
    return parser


def settled(options: argparse.Namespace) -> argparse.Namespace:
    """The options with the defaults that depend on others."""
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.layers = options.layers or (_QUICK_LAYERS if options.quick else LAYERS)
    options.data = options.data.resolve()
    return options


def chosen(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """Those of the cases that --cases and --quick ask for.

    Raises:
        SystemExit: there is no case of a name that was given.
    """
    names = [case.name for case in cases]
    unknown = [name for name in options.cases or () if name not in names]
    if unknown:
        raise SystemExit(f"--cases {','.join(unknown)}: there are {', '.join(names)}")
    if options.cases is not None:
        return [case for case in cases if case.name in options.cases or case.kind == "import"]
    return [case for case in cases if not (options.quick and case.extrapolated)]


def benchmark(cases: Sequence[Case], options: argparse.Namespace, yardstick: str, legend: str, **versions: str) -> None:
    """Run the cases, print the table.

    Args:
        cases: the rows.
        options: from `settled`.
        yardstick, legend: see `table`.
        versions: of what else the figures depend on.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that outputs are deleted then, too
    options.data.mkdir(parents=True, exist_ok=True)
    facts = machine()
    facts["versions"] |= versions

    def save(runs: dict[str, list[Run]]) -> None:
        if options.json is None:
            return
        rows = [
            {**asdict(case), "runs": [{"round": run.round, "layers": run.layers, **asdict(run.measured)}
                                      for run in runs[case.name]]}
            for case in cases
        ]  # fmt: skip
        document = {"machine": facts, "layers": options.layers, "rank": options.rank, "cases": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    runs = run_rounds(cases, options.data, options.rounds, save)
    print(table(cases, runs, yardstick, legend))
    print(f"\n{_machine_line(facts, options)}")
