"""How long `nlora_surgery init` takes, beside `cp -r` of the same model and beside PEFT's inits.

    python benchmarks/init.py --json bench-data/init.json
    python benchmarks/init.py --quick
    python benchmarks/init.py --cases cp,nystrom --ranks 16,64,256 --sizes 11,44 --processes 1,2

How it measures is said in `rounds.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in {None, ""}:  # run as a script: let it find its neighbours as a package, as -m does
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rounds import Case, benchmark, chosen, command_line, limits, positive, settled


@dataclass(frozen=True, kw_only=True)
class InitCase(Case):
    """An init, ours or PEFT's.

    Attributes:
        kind: `ours` or `peft`.
        rank: r.
        processes: how many torchrun starts; None runs without torchrun.
    """

    rank: int
    processes: int | None = None

    def command(self, inputs: Sequence[Path], out: Path) -> list[str]:
        """The program and its arguments."""
        rank = ["--rank", str(self.rank)]
        model = str(inputs[0])
        if self.kind == "peft":
            return [sys.executable, "-m", "benchmarks.peers", "init", model, str(out), *self.arguments, *rank]
        launcher = [sys.executable]
        if self.processes is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        ours = ["-m", "benchmarks.ours", "init", model, "-o", str(out), "--device", "cpu"]
        return [*launcher, *ours, *self.arguments, *rank]


def main_cases(layers: int, rank: int) -> list[Case]:
    """What is compared at one size and one rank."""

    def ours(name: str, title: str, *arguments: str, **more: Any) -> Case:
        return InitCase(
            name=name, title=f"init {title}", kind="ours", layers=layers, rank=rank,
            arguments=("--method", *arguments), yardstick="nystrom", **more,
        )  # fmt: skip

    def peft(init: str, **more: Any) -> Case:
        return InitCase(
            name=f"peft-{init.replace('_', '-')}", title=f"PEFT {init}", kind="peft", layers=layers, rank=rank,
            arguments=("--init", init), yardstick="nystrom", **more,
        )  # fmt: skip

    return [
        *limits(layers),
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
            own = {"title": f"{case.title}, {layers} layers", "layers": layers}
            if case.yardstick is not None and layers != case.layers:
                own["yardstick"] = f"{case.yardstick}-{layers}-layers"
            yield replace(case, name=f"{case.name}-{layers}-layers", **own)
    for case in swept:
        for count in processes:
            title = f"{case.title}, torchrun × {count}"
            yield replace(case, name=f"{case.name}-{count}-processes", title=title, processes=count)


def all_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for, none of them twice.

    Raises:
        SystemExit: there is no case of a name that was given.
    """
    main = main_cases(options.layers, options.rank)
    cases = chosen(main, options)
    named = {"name": "", "title": "", "yardstick": None}
    alike = {replace(case, **named) for case in cases}
    for case in sweep_cases(main, options.ranks, options.sizes, options.processes):
        if replace(case, **named) not in alike:
            alike.add(replace(case, **named))
            cases.append(case)
    return cases


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [positive(part) for part in text.split(",")]

    parser = command_line(__doc__)
    parser.add_argument("--ranks", type=numbers, default=[], help="also nystrom and sketch at these ranks")
    parser.add_argument("--sizes", type=numbers, default=[], help="also cp, nystrom, sketch with so many layers")
    parser.add_argument("--processes", type=numbers, default=[], help="also nystrom and sketch under torchrun")
    return settled(parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table."""
    options = _parse(arguments)
    legend = "time after the imports to that of `init nystrom, baked`, at the same depth."
    benchmark(all_cases(options), options, "nystrom", legend)


if __name__ == "__main__":
    main()
