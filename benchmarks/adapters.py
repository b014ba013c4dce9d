"""How long `nlora_surgery merge` and `extract` take, beside `cp -r`, PEFT's merge and mergekit's extraction.

    python benchmarks/adapters.py --json bench-data/adapters.json
    python benchmarks/adapters.py --quick
    python benchmarks/adapters.py --mergekit ~/mergekit/bin/python

A random LoRA of all seven projections is merged into the checkpoint, by us and by PEFT; then it is extracted from
base and merged model, by us and by mergekit. How it is measured is said in `rounds.py`.

mergekit is run by a Python of its own, so that its requirements leave this environment as it is: --mergekit names one
that has it, otherwise an environment is made in DATA/mergekit-venv, with pip, once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

if __package__ in {None, ""}:  # run as a script: let it find its neighbours as a package, as -m does
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rounds import Case, benchmark, built, checkpoint, chosen, command_line, limits, say, settled

_MERGEKIT: Final = "mergekit==0.1.5"


@dataclass(frozen=True, kw_only=True)
class AdapterCase(Case):
    """A merge or an extraction.

    Attributes:
        kind: `ours`, `peft` or `mergekit`.
        command_name: `merge` or `extract`.
        rank: r of the adapter that is merged, and of the one that is extracted.
        python: that runs it.
    """

    command_name: str
    rank: int
    python: str = sys.executable

    def inputs(self, data: Path, layers: int) -> list[Path]:
        """The base, and the adapter or the merged model."""
        base = checkpoint(data, layers)
        adapter = data / f"{base.name}-lora-r{self.rank}"
        built(adapter, "-m", "benchmarks.synthetic", adapter, "--layers", layers, "--lora", self.rank)
        if self.command_name == "merge":
            return [base, adapter]
        merged = data / f"{base.name}-merged-r{self.rank}"
        built(merged, "-m", "nlora_surgery", "merge", base, adapter, "-o", merged, "--device", "cpu")
        return [base, merged]

    def command(self, inputs: Sequence[Path], out: Path) -> list[str]:
        """The program and its arguments."""
        rank = ["--rank", str(self.rank)] if self.command_name == "extract" else []
        paths = [str(path) for path in inputs]
        if self.kind == "ours":
            ours = [self.python, "-m", "benchmarks.ours", self.command_name, *paths, "-o", str(out), "--device", "cpu"]
            return [*ours, *self.arguments, *rank]
        return [self.python, "-m", "benchmarks.peers", self.command_name, *paths, str(out), *rank]


def all_cases(layers: int, rank: int, mergekit: str) -> list[Case]:
    """What is compared.

    Args:
        layers: of the checkpoint.
        rank: of the adapter.
        mergekit: the Python that has it.
    """

    def case(name: str, title: str, kind: str, command: str, *arguments: str, **more: Any) -> Case:
        return AdapterCase(
            name=name, title=title, kind=kind, command_name=command, layers=layers, rank=rank,
            arguments=arguments, yardstick=command, **more,
        )  # fmt: skip

    return [
        *limits(layers),
        case("merge", "merge", "ours", "merge"),
        case("peft-merge", "PEFT: load, merge_and_unload, save", "peft", "merge"),
        case("extract", "extract", "ours", "extract"),
        case("extract-svd", "extract, svd", "ours", "extract", "--method", "svd", most_rounds=3, extrapolated=True),
        case("mergekit", "mergekit-extract-lora", "mergekit", "extract", python=mergekit, most_rounds=3,
             extrapolated=True),
    ]  # fmt: skip


def install_mergekit(environment: Path) -> None:
    """Make an environment with mergekit, if it is not there."""
    ready = environment / ".installed"
    if not ready.exists():
        say(f"installing {_MERGEKIT} into {environment}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        install = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", _MERGEKIT]
        subprocess.run(install, check=True, stdout=sys.stderr)
        ready.touch()


def _version(python: str) -> str:
    code = "from importlib.metadata import version; print(version('mergekit'), 'with torch', version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{python} has no mergekit; leave --mergekit away to have an environment made")
    return done.stdout.strip()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--mergekit", metavar="PYTHON", help="one that has mergekit  [DATA/mergekit-venv]")
    return settled(parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the table."""
    options = _parse(arguments)
    environment = options.data / "mergekit-venv"
    python = options.mergekit or str(environment / "bin" / "python")
    cases = chosen(all_cases(options.layers, options.rank, python), options)
    versions = {}
    if any(case.kind == "mergekit" for case in cases):
        if options.mergekit is None:
            install_mergekit(environment)
        versions["mergekit"] = _version(python)
    legend = "time after the imports to that of `merge` or of `extract`, whichever does the same."
    benchmark(cases, options, "ours", legend, **versions)


if __name__ == "__main__":
    main()
