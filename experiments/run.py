"""Run the table: `python -m experiments.run --model MODEL --train-data FILE --test-data FILE`.

Every run is `nlora_surgery init` and `nlora_surgery train` in processes of their own, and one line of JSON when it is
done. A run that has its line is not repeated, and one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import click

from experiments.table import GRID_STEPS, STAGES, Run, Start, Trial
from nlora_surgery.errors import TrainingError

__all__ = ["RESULTS", "Runner", "append_result", "losses_by_rate", "provenance", "read_results"]

RESULTS: Final = Path(__file__).parent / "results" / "language.jsonl"

_FOLDED: Final = "folded"  # folder of the two-matrix adapter in a start
_PACKAGES: Final = ("torch", "transformers", "accelerate")


def read_results(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The results by the names of their runs."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {result["name"]: result for result in map(json.loads, lines)}


def append_result(path: Path, result: Mapping[str, Any]) -> None:
    """One more line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def losses_by_rate(start: Start, mode: str, results: Iterable[Mapping[str, Any]]) -> dict[float, float]:
    """Final losses of the short runs from a start, by ascending learning rate; infinite where training failed."""
    wanted = asdict(start)
    found = {
        float(result["run"]["lr"]): math.inf if "failed" in result else float(result["eval"][-1][1])
        for result in results
        if result["run"]["start"] == wanted
        and (result["run"]["mode"], result["run"]["steps"], result["run"]["seed"]) == (mode, GRID_STEPS, 0)
    }
    return dict(sorted(found.items()))


@dataclass
class Runner:
    """Makes starts, trains, and notes what came of it.

    Attributes:
        model: directory of the model.
        train_data, test_data: .jsonl files with `question` and `answer`.
        work: directory for what can be thrown away.
        results: the file of results.
        max_characters: longer problems (question and answer together) are left out, for the sake of time.
        threads: of each process.
    """

    model: Path
    train_data: Path
    test_data: Path
    work: Path
    results: Path = RESULTS
    max_characters: int = 350
    threads: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _starts: dict[str, threading.Lock] = field(default_factory=dict)

    def finish(self, each: Trial | Run) -> Iterator[dict[str, Any]]:
        """Do what has no result yet of a trial, or of a run by itself.

        A trial searches its learning rate first; its long runs take the one found.

        Yields:
            The result of each run, as it ends.

        Raises:
            LookupError: no learning rate ends with a finite loss.
            subprocess.CalledProcessError: as in `run`.
        """
        while (run := self.pending(each)) is not None:
            yield self.run(run)

    def pending(self, each: Trial | Run) -> Run | None:
        """The run that comes next, None if there is nothing left to do.

        Raises:
            LookupError: no learning rate ends with a finite loss.
        """
        done = read_results(self.results)
        if isinstance(each, Run):
            return None if each.name in done else each
        losses = losses_by_rate(each.start, each.mode, done.values())
        lr = each.next_rate(losses)
        if lr is not None:
            return each.short(lr)
        best = min(losses, key=losses.__getitem__)
        if not math.isfinite(losses[best]):
            raise LookupError(f"{each.name} ends in a finite loss at none of {len(losses)} learning rates")
        return next((run for run in each.long(best) if run.name not in done), None)

    def run(self, run: Run) -> dict[str, Any]:
        """Train, and append the result to the file; a run that ends in a loss that is not finite has one, too.

        Raises:
            subprocess.CalledProcessError: a command failed for another reason.
        """
        began = time.monotonic()
        prepared, start = self._prepare(run)
        out = self.work / "runs" / run.name
        result: dict[str, Any] = {"name": run.name, "run": asdict(run), "init": start, "resumed": out.exists()}
        try:
            report = json.loads(self._command(self._train_command(run, prepared, out), f"{run.name}.log"))
            step = float(f"{report['first_step'] / run.lr:.4g}")
            result |= {"trainable": report["trainable"], "step_per_rate": step, "eval": _eval_losses(out)}
        except subprocess.CalledProcessError as error:
            if error.returncode != TrainingError.exit_code:
                raise
            result |= {"failed": error.stderr.strip().splitlines()[-1], "eval": _eval_losses(out)}
        result |= {
            "data": {"max_characters": self.max_characters, "sha256": self._data_digest(run)},
            "seconds": round(time.monotonic() - began, 1),
        }
        result |= provenance(self.threads, _PACKAGES)
        with self._lock:
            append_result(self.results, result)
        shutil.rmtree(out)
        return result

    def _prepare(self, run: Run) -> tuple[Path, dict[str, Any]]:
        """Make a start, once for all runs from it; what init said of it lies beside it."""
        name = f"{run.start.name}-seed{run.seed}"
        with self._lock:
            lock = self._starts.setdefault(name, threading.Lock())
        prepared = self.work / "starts" / name
        record = prepared.with_suffix(".json")
        with lock:
            if not record.exists():
                prepared.parent.mkdir(parents=True, exist_ok=True)
                began = time.monotonic()
                command = ["init", str(self.model), "-o", str(prepared), *run.start.arguments(run.seed)]
                manifest = json.loads(self._command([*command, "--overwrite", "--json"], f"{name}.log"))
                if run.start.folded:
                    folded = ["-o", str(prepared / _FOLDED), "--to", "lora", "--overwrite"]
                    self._command(["convert", str(prepared / "adapter"), *folded], f"{name}-folded.log")
                figures: dict[str, Any] = {"seconds": round(time.monotonic() - began, 2)}
                for figure in ("energy", "delta_ratio", "drift"):
                    values = [module[figure] for module in manifest["modules"] if module[figure] is not None]
                    figures[figure] = float(f"{statistics.fmean(values):.4g}") if values else None
                record.write_text(json.dumps(figures), encoding="utf-8")
            return prepared, json.loads(record.read_text(encoding="utf-8"))

    def _train_command(self, run: Run, prepared: Path, out: Path) -> list[str]:
        options = {
            "--data": self._data("train", None),
            "--eval-data": self._data("test", run.problems),
            "--train": run.mode,
            "--lr": run.lr,
            "--max-steps": run.steps,
            "--eval-steps": run.eval_steps,
            "--save-steps": 30,
            "--save-limit": 1,
            "--batch-size": run.batch_size,
            "--grad-accum": 1,
            "--seed": run.seed,
            "--dtype": run.dtype,
            "--out": out,
        }
        words = [str(word) for pair in options.items() for word in pair]
        adapter = ["--adapter", str(prepared / _FOLDED)] if run.start.folded else []
        return ["train", str(prepared), *words, *adapter, "--json", *(["--resume"] if out.exists() else [])]

    def _data(self, split: str, most: int | None) -> Path:
        """A file of the problems that are short enough, the first `most` of them."""
        path = self.work / f"{split}-{most or 'all'}.jsonl"
        with self._lock:
            if not path.exists():
                source = self.train_data if split == "train" else self.test_data
                rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
                short = [row for row in rows if len(row["question"]) + len(row["answer"]) <= self.max_characters]
                path.write_text("".join(json.dumps(row) + "\n" for row in short[:most]), encoding="utf-8")
        return path

    def _data_digest(self, run: Run) -> str:
        digest = hashlib.sha256()
        for path in (self._data("train", None), self._data("test", run.problems)):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def _command(self, arguments: list[str], log: str) -> str:
        """Run one command of nlora_surgery; what it says on the way goes to a log."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "nlora_surgery", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        logs = self.work / "logs"
        logs.mkdir(exist_ok=True)
        (logs / log).write_text(f"{' '.join(arguments)}\n{done.stderr}", encoding="utf-8")
        done.check_returncode()
        return done.stdout


def _eval_losses(out: Path) -> list[tuple[int, float]]:
    """Step and loss on the test problems, from the run's metrics."""
    path = out / "metrics.jsonl"
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    return [(entry["step"], round(entry["eval_loss"], 5)) for entry in entries if "eval_loss" in entry]


def provenance(threads: int, packages: Iterable[str]) -> dict[str, Any]:
    """Where a result comes from: `machine` (processor, threads), `versions` of packages, `date`."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "machine": {"cpu": names[0] if names else platform.machine(), "threads": threads},
        "versions": {name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--train-data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--test-data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("experiments-work"), show_default=True,
              help="For starts and runs; can be deleted.")  # fmt: skip
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--max-characters", type=int, default=350, show_default=True, help="Longer problems are left out.")
@click.option("--workers", type=int, default=1, show_default=True, help="Runs at a time.")
@click.option("--threads", type=int, default=1, show_default=True, help="Of each run.")
@click.option("--stage", "stages", multiple=True, help="Only these.")
@click.option("--dry-run", is_flag=True, help="Say what comes next for each trial.")
def main(workers: int, stages: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Train what has no result yet, trial by trial."""
    runner = Runner(**options)
    runner.work.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in STAGES if not stages or stage.name in stages]
    work = [each for stage in chosen for each in stage.work]
    if dry_run:
        for each in work:
            run = runner.pending(each)
            click.echo(f"{each.name}: {'done' if run is None else run.name}")
        return

    def finish(each: Trial | Run) -> None:
        for result in runner.finish(each):
            last = result.get("failed") or f"{result['eval'][-1][1]:.4f}"
            click.echo(f"{result['name']}: {last}  ({result['seconds']:.0f} s)")

    with ThreadPoolExecutor(workers) as pool:  # to the end, whatever becomes of one of them
        finished = [pool.submit(finish, each) for each in work]
    for future in finished:
        future.result()


if __name__ == "__main__":
    main()
