"""How long `nlora_surgery init` takes, beside `cp -r` of the same model and beside PEFT's inits.

    python benchmarks/init.py --json bench-data/init.json
    python benchmarks/init.py --quick
    python benchmarks/init.py --cases cp,nystrom --ranks 16,64,256 --sizes 11,44 --processes 1,2

Every run is a process of its own, started with the model in the page cache; its output is deleted after it.
The cases alternate in rounds (A B C A B C …), so that whatever else the machine does meets all of them. The
two exact SVDs would take most of the time of a benchmark: they run on checkpoints of one and of two layers,
and what the second layer adds counts for every further one.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

if __package__ in {None, ""}:  # run as a script: let it find its neighbours as a package, as -m does
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import ROOT, Measurement, measure
from benchmarks.synthetic import LAYERS

_OFFLINE: Final = {"HF_HUB_OFFLINE": "1"}
_PACKAGES: Final = ("torch", "transformers", "peft", "safetensors")
_EXTRAPOLATED_FROM: Final = (1, 2)  # layers
_QUICK_LAYERS: Final = 2


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: for --cases, and unique.
        title: for the table.
        kind: `copy`; `import` only imports torch, the baseline of the memory; `ours`; `peft`.
        layers: of the checkpoint.
        rank: r.
        arguments: for the command line of `kind`.
        processes: how many torchrun starts; None runs without torchrun.
        most_rounds: where a run takes so long that the other cases get more rounds; None has all of them.
        extrapolated: whether it runs on the shallow checkpoints instead.
    """

    name: str
    title: str
    kind: Literal["copy", "import", "ours", "peft"]
    layers: int
    rank: int
    arguments: tuple[str, ...] = ()
    processes: int | None = None
    most_rounds: int | None = None
    extrapolated: bool = False

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths of the checkpoints that it runs on."""
        return _EXTRAPOLATED_FROM if self.extrapolated and self.layers > max(_EXTRAPOLATED_FROM) else (self.layers,)

    def command(self, model: Path, out: Path) -> list[str]:
        """The program and its arguments."""
        if self.kind == "copy":
            return ["cp", "-r", str(model), str(out)]
        if self.kind == "import":
            return [sys.executable, "-c", "import torch"]
        rank = ["--rank", str(self.rank)]
        if self.kind == "peft":
            return [sys.executable, "-m", "benchmarks.peers", str(model), str(out), *self.arguments, *rank]
        launcher = [sys.executable]
        if self.processes is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        ours = ["-m", "benchmarks.ours", "init", str(model), "-o", str(out), "--device", "cpu"]
        return [*launcher, *ours, *self.arguments, *rank]


@dataclass(frozen=True)
class Run:
    """One measured run of a case."""

    round: int
    layers: int
    measured: Measurement


def main_cases(layers: int, rank: int) -> list[Case]:
    """What is compared at one size and one rank."""

    def ours(name: str, title: str, *arguments: str, **limits: Any) -> Case:
        return Case(name, f"init {title}", "ours", layers, rank, ("--method", *arguments), **limits)

    def peft(init: str, **limits: Any) -> Case:
        name = f"peft-{init.replace('_', '-')}"
        return Case(name, f"PEFT {init}", "peft", layers, rank, ("--init", init), **limits)

    return [
        Case("cp", "cp -r", "copy", layers, rank),
        ours("nystrom", "nystrom, baked", "nystrom"),
        ours("nystrom-virtual", "nystrom, virtual", "nystrom", "--residual", "virtual"),
        ours("nystrom-optimal", "nystrom-optimal", "nystrom-optimal"),
        ours("sketch", "sketch", "sketch"),
        ours("pissa-fast", "pissa-fast", "pissa-fast"),
        ours("pissa", "pissa", "pissa", most_rounds=3, extrapolated=True),
        peft("lora"),
        peft("pissa_niter_4"),
        peft("olora", most_rounds=3),
        peft("pissa", most_rounds=2, extrapolated=True),
    ]


def sweep_cases(
    main: Sequence[Case], ranks: Sequence[int], sizes: Sequence[int], processes: Sequence[int]
) -> Iterator[Case]:
    """The same at other ranks, depths and numbers of processes.

    Args:
        main: from `main_cases`.
        ranks: for nystrom and sketch.
        sizes: numbers of layers, for cp, nystrom and sketch.
        processes: for nystrom and sketch under torchrun.
    """
    by_name = {case.name: case for case in main}
    swept = [by_name["nystrom"], by_name["sketch"]]
    for case in swept:
        for rank in ranks:
            yield replace(case, name=f"{case.name}-r{rank}", title=f"{case.title}, rank {rank}", rank=rank)
    for case in [by_name["cp"], *swept]:
        for layers in sizes:
            title = f"{case.title}, {layers} layers"
            yield replace(case, name=f"{case.name}-{layers}-layers", title=title, layers=layers)
    for case in swept:
        for count in processes:
            title = f"{case.title}, torchrun × {count}"
            yield replace(case, name=f"{case.name}-{count}-processes", title=title, processes=count)


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for, none of them twice.

    Raises:
        SystemExit: there is no case of a name that was given.
    """
    main = main_cases(options.layers, options.rank)
    names = [case.name for case in main]
    unknown = [name for name in options.cases or () if name not in names]
    if unknown:
        raise SystemExit(f"--cases {','.join(unknown)}: there are {', '.join(names)}")
    chosen = [case for case in main if options.cases is None or case.name in options.cases]
    if options.quick and options.cases is None:
        chosen = [case for case in chosen if not case.extrapolated]
    alike = {(case.kind, case.layers, case.rank, case.arguments, case.processes) for case in chosen}
    for case in sweep_cases(main, options.ranks, options.sizes, options.processes):
        key = case.kind, case.layers, case.rank, case.arguments, case.processes
        if key not in alike:
            alike.add(key)
            chosen.append(case)
    return [Case("python", "python, import torch", "import", options.layers, options.rank), *chosen]


# --- running ---------------------------------------------------------------------------------------------


def checkpoint(data: Path, layers: int) -> Path:
    """The checkpoint of that depth, built if it is not there (in a process of its own: this one stays small)."""
    directory = data / f"llama-{layers}-layers"
    if not directory.exists():
        _say(f"building {directory.name}")
        command = [sys.executable, "-m", "benchmarks.synthetic", str(directory), "--layers", str(layers)]
        subprocess.run(command, cwd=ROOT, check=True)
    return directory


def run_once(case: Case, data: Path, layers: int) -> Measurement:
    """One run, from a warm page cache, with nothing of an earlier run still to be written to the disk."""
    model = checkpoint(data, layers)
    _read_all(model)
    os.sync()
    with tempfile.TemporaryDirectory(prefix="run-", dir=data) as directory:
        measured = measure(case.command(model, Path(directory) / "out"), _OFFLINE)
    if case.kind == "copy":  # which has nothing to import
        measured = replace(measured, work_seconds=measured.wall_seconds)
    return measured


def run_rounds(
    cases: Sequence[Case], data: Path, rounds: int, after_round: Callable[[dict[str, list[Run]]], None]
) -> dict[str, list[Run]]:
    """All cases, alternating.

    Args:
        cases: to run.
        data: the directory of the checkpoints, and of the outputs while they exist.
        rounds: how many times each case runs, unless it has a limit of its own.
        after_round: called with what there is.

    Returns:
        The runs of each case, by its name.
    """
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    for layers in sorted({layers for case in cases for layers in case.depths}):
        checkpoint(data, layers)
    for index in range(rounds):
        for case in cases:
            if case.most_rounds is not None and index >= case.most_rounds:
                continue
            for layers in case.depths:
                measured = run_once(case, data, layers)
                runs[case.name].append(Run(index, layers, measured))
                where = f" on {layers} layers" if case.depths != (case.layers,) else ""
                _say(f"round {index + 1} of {rounds}: {case.title}{where}: {measured.wall_seconds:.2f} s")
        after_round(runs)
    return runs


def _read_all(directory: Path) -> None:
    buffer = bytearray(8 << 20)
    for path in directory.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _say(text: str) -> None:
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


def table(cases: Sequence[Case], runs: dict[str, list[Run]], rank: int) -> str:
    """The Markdown table of what was measured, and below it what its columns mean.

    Args:
        cases: the rows.
        runs: of each case, by its name.
        rank: of the init that ratios are taken to.
    """
    figures = {case.name: summarize(case, runs[case.name]) for case in cases}
    copied = {case.layers: figures[case.name].wall for case in cases if case.kind == "copy"}
    nystrom = ("--method", "nystrom")
    ours = {
        case.layers: figures[case.name].work
        for case in cases
        if case.arguments == nystrom and case.rank == rank and case.processes is None
    }
    baseline = next((figures[case.name].anonymous_bytes for case in cases if case.kind == "import"), None) or 0

    lines = [_row(_HEADER), _row(["---", *["---:"] * (len(_HEADER) - 1)])]
    for case in cases:
        summary = figures[case.name]
        anonymous = summary.anonymous_bytes
        if anonymous is not None and case.kind != "copy":
            anonymous = max(0, anonymous - baseline * runs[case.name][0].measured.processes)
        note = f" from {' and '.join(map(str, case.depths))} layers" if len(case.depths) > 1 else ""
        wall = _median(summary.wall)
        spread = f" ({min(summary.wall):.2f}–{max(summary.wall):.2f})" if summary.wall else ""
        cells = [
            case.title,
            f"{len(summary.wall)}{note}",
            _figure(wall, ".2f") + spread,
            _figure(_ratio(wall, _median(copied.get(case.layers, []))), ".2f"),
            _figure(_median(summary.work), ".2f"),
            _figure(_ratio(_median(summary.work), _median(ours.get(case.layers, []))), ".2f"),
            _figure(_megabytes(summary.rss_bytes), ",.0f"),
            _figure(_megabytes(anonymous), ",.0f"),
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n\n" + _LEGEND


_HEADER: Final = (
    "case", "rounds", "wall s, median (min–max)", "÷ cp",
    "s after imports", "÷ nystrom", "peak RSS MB", "peak anonymous MB",
)  # fmt: skip
_LEGEND: Final = """\
÷ cp: wall time to that of `cp -r`. ÷ nystrom: time after the imports to that of `init nystrom, baked`. Both at the
same depth. Peak RSS counts mapped files, and what processes share once for each. Peak anonymous memory is above
that of a Python that has imported torch (`cp`: as it is)."""


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


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_number, help="of every case; slow ones have fewer  [5, with --quick 2]")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="only these, by name, comma-separated")
    parser.add_argument("--layers", type=_number, help=f"of the checkpoint  [{LAYERS}, with --quick {_QUICK_LAYERS}]")
    parser.add_argument("--rank", type=_number, default=64, help="[%(default)s]")
    parser.add_argument("--ranks", type=_numbers, default=[], help="also nystrom and sketch at these ranks")
    parser.add_argument("--sizes", type=_numbers, default=[], help="also cp, nystrom, sketch with so many layers")
    parser.add_argument("--processes", type=_numbers, default=[], help="also nystrom and sketch under torchrun")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few layers, few rounds, no exact SVD")
    parser.add_argument("--data", type=Path, default=ROOT / "bench-data", help="checkpoints and outputs  [bench-data]")
    parser.add_argument("--json", type=Path, help="file for the single measurements, written after every round")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.layers = options.layers or (_QUICK_LAYERS if options.quick else LAYERS)
    options.data = options.data.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that outputs are deleted then, too
    options = _parse(arguments)
    cases = chosen_cases(options)
    facts = machine()

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
    print(table(cases, runs, options.rank))
    print(f"\n{_machine_line(facts, options)}")


if __name__ == "__main__":
    main()
