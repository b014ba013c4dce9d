"""What the page compares: the trials of each question, with what came of them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from experiments import vision
from experiments.run import losses_by_rate
from experiments.table import LONG_STEPS, STAGES, Start, Trial
from experiments.vision import mean_losses

__all__ = [
    "ALIKE",
    "LANGUAGE",
    "RANKS",
    "VISION",
    "Found",
    "Result",
    "Trained",
    "language",
    "near_rates",
    "vision_transformer",
    "with_steps",
]

_NEAR: Final = 1.02  # of the best loss: the learning rates that do as well

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Trained:
    """What came of a trial.

    Attributes:
        start: the title of its start.
        mode: how it was trained.
        runs: all results, short and long, of all seeds.
        losses: final loss of the short runs, the mean where there are seeds, by ascending learning rate; infinite where
            training failed. Empty for runs without a search.
    """

    start: str
    mode: str
    runs: Sequence[Result]
    losses: Mapping[float, float]

    @property
    def title(self) -> str:
        """Start and mode, where the start does not say it."""
        return f"{self.start}, {self.mode}" if self.mode in {"inttune", "dora"} else self.start

    @property
    def best_rate(self) -> float:
        """The learning rate of the lowest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def best_loss(self) -> float:
        """The lowest loss."""
        return self.losses[self.best_rate]

    @property
    def step_per_rate(self) -> float | None:
        """See `nlora_surgery.training.layers.first_step`; the mean over the starts of all seeds."""
        found = [run["step_per_rate"] for run in self.runs if run.get("step_per_rate") is not None]
        return statistics.fmean(found) if found else None

    def loss_at(self, lr: float) -> float | None:
        """The loss between two learning rates that were tried, linear in the logarithm; None beyond them."""
        for (low, before), (high, after) in itertools.pairwise(self.losses.items()):
            if low <= lr <= high:
                share = math.log(lr / low) / math.log(high / low)
                return before + share * (after - before)
        return None

    @property
    def best(self) -> list[Result]:
        """The short runs at the best learning rate, one for each seed."""
        runs = [run for run in self.runs if run["run"]["lr"] == self.best_rate and run["run"]["steps"] != LONG_STEPS]
        return sorted(runs, key=lambda run: int(run["run"]["seed"]))

    @property
    def long(self) -> list[Result]:
        """The runs that count, of the language model."""
        return [run for run in self.runs if run["run"]["steps"] == LONG_STEPS and "failed" not in run]


def near_rates(losses: Mapping[float, float]) -> list[float]:
    """The learning rates around the best one that come within 2 % of its loss, none between them left out.

    Args:
        losses: by ascending learning rate.
    """
    rates = list(losses)
    best = min(losses.values())
    at = next(i for i, lr in enumerate(rates) if losses[lr] == best)
    good = [losses[lr] <= _NEAR * best for lr in rates]
    first = next((i + 1 for i in range(at, -1, -1) if not good[i]), 0)
    end = next((i for i in range(at, len(rates)) if not good[i]), len(rates))
    return rates[first:end]


RANKS: Final = (4, 8, 16, 32, 64, 128)
_PAIRS: Final = tuple(pair for r in RANKS for pair in ((f"slora-r{r}", "slora"), (f"nystrom-r{r}", "nlora")))

# By question: the start's name and the mode.
LANGUAGE: Final = {
    "starts": (
        ("lora-r64", "lora"),
        ("slora-r64", "slora"),
        ("nystrom-r64", "nlora"),
        ("nystrom-pinv-r64", "nlora"),
        ("nystrom-optimal-r64", "nlora"),
        ("pissa-r64-lora", "lora"),
        ("pissa-fast-r64", "nlora"),
        ("sketch-r64", "nlora"),
    ),
    "inttune": (
        ("lora-r64", "lora"),
        ("nystrom-r64", "inttune"),
        ("sketch-r64-core", "inttune"),
        ("sketch-r128-core", "inttune"),
        ("sketch-r256-core", "inttune"),
    ),
    "core": (
        ("nystrom-r64", "nlora"),
        ("nystrom-pinv-r64", "nlora"),
        ("nystrom-optimal-r64", "nlora"),
        ("nystrom-r64-none", "nlora"),
        ("nystrom-r64-virtual", "nlora"),
        ("nystrom-pinv-r64-virtual", "nlora"),
        ("nystrom-optimal-r64-virtual", "nlora"),
    ),
    "splits": (
        ("nystrom-optimal-r64", "nlora"),
        ("nystrom-optimal-r64-balanced", "nlora"),
        ("nystrom-optimal-r64-core", "nlora"),
        ("sketch-r64", "nlora"),
        ("sketch-r64-core", "nlora"),
    ),
    "rank": _PAIRS,
    "order": (("nystrom-r64", "nlora"), ("nystrom-r64-folded", "lora")),
}

# Run once, beside what it should come out like.
ALIKE: Final = {
    "inttune": {
        ("pissa-r64-core", "inttune"): ("sketch-r64-core", "inttune"),
    },
    "core": {
        (f"{method}-r64-virtual", "nlora"): (f"{method}-r64", "nlora")
        for method in ("nystrom", "nystrom-pinv", "nystrom-optimal")
    },
}
VISION: Final = {
    "starts": (
        ("lora-r16", "lora"),
        ("slora-r16", "slora"),
        ("nystrom-r16", "nlora"),
        ("nystrom-optimal-r16", "nlora"),
        ("pissa-r16-lora", "lora"),
        ("sketch-r16", "nlora"),
    ),
    "splits": (
        ("nystrom-optimal-r16", "nlora"),
        ("nystrom-optimal-r16-balanced", "nlora"),
        ("nystrom-optimal-r16-core", "nlora"),
        ("sketch-r16", "nlora"),
        ("sketch-r16-core", "nlora"),
    ),
    "rank": _PAIRS,
    "inttune": (
        ("lora-r16", "lora"),
        ("nystrom-r16", "inttune"),
        ("nystrom-optimal-r16", "inttune"),
        ("sketch-r16-core", "inttune"),
        *((start, "inttune") for r in (32, 64) for start in (f"nystrom-r{r}", f"sketch-r{r}-core")),
    ),
    "core": tuple(
        (f"{method}-r16{residual}", "nlora")
        for residual in ("", "-none")
        for method in ("nystrom", "nystrom-pinv", "nystrom-optimal")
    ),
    "order": (
        ("nystrom-r16", "nlora"),
        ("nystrom-r16-folded", "lora"),
        ("nystrom-optimal-r16", "nlora"),
        ("nystrom-optimal-r16-folded", "lora"),
    ),
    "dora": tuple(
        (start, mode)
        for start in ("lora-r16", "pissa-r16-lora", "nystrom-r16-folded", "nystrom-optimal-r16-folded")
        for mode in ("lora", "dora")
    ),
}

Found = Mapping[tuple[str, str], Trained]


def _title(start: Start, usual_rank: int) -> str:
    words = [
        start.method if start.rank == usual_rank else f"{start.method}, r = {start.rank}",
        start.split,
        "two matrices" if start.two_matrix else None,
        "folded" if start.folded else None,
        {"baked": None, "none": "no residual", "virtual": "virtual residual"}[start.residual],
    ]
    return ", ".join(filter(None, words))


def language(results: Iterable[Result]) -> dict[tuple[str, str], Trained]:
    """What was trained of the language model, by start and mode; searches that are not done are left out."""
    results = list(results)

    def trained(start: Start, mode: str, losses: Mapping[float, float]) -> Trained:
        runs = [run for run in results if Start(**run["run"]["start"]) == start and run["run"]["mode"] == mode]
        return Trained(_title(start, 64), mode, runs, losses)

    found = {}
    for stage in STAGES:
        for trial in stage.trials:
            losses = losses_by_rate(trial.start, trial.mode, results)
            if _is_done(trial, losses):
                found[trial.start.name, trial.mode] = trained(trial.start, trial.mode, losses)
        for run in stage.others:
            if any(result["name"] == run.name for result in results):
                found.setdefault((run.start.name, run.mode), trained(run.start, run.mode, {}))
    return found


def vision_transformer(results: Iterable[Result]) -> dict[tuple[str, str], Trained]:
    """What was trained of the vision transformer, by start and mode."""
    results = list(results)
    found = {}
    for trial in vision.TRIALS:
        key = trial.start.name, trial.mode
        losses = mean_losses(trial, results)
        if _is_done(trial, losses):
            runs = [run for run in results if (run["run"]["start"], run["run"]["mode"]) == key]
            found[key] = Trained(_title(trial.start, 16), trial.mode, runs, losses)
    return found


def _is_done(trial: Trial, losses: Mapping[float, float]) -> bool:
    return trial.next_rate(losses) is None and math.isfinite(min(losses.values()))


def with_steps(found: Found) -> list[tuple[Trained, float]]:
    """What was searched with a known first step, and that, of baked and virtual starts."""
    return [
        (each, step)
        for each in found.values()
        if each.losses and (step := each.step_per_rate) is not None and "no residual" not in each.start
    ]
