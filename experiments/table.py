"""The trials: which starts are trained how, in the order in which they answer something.

A stage compares starts in one respect. For each start short runs search a learning rate of its own, until the best one
has a worse one on either side; long runs at that rate are what is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

__all__ = [
    "GRID_STEPS",
    "LEAST_RATES",
    "LONG_STEPS",
    "PAPER_RATE",
    "RATES",
    "STAGES",
    "Run",
    "Stage",
    "Start",
    "Trial",
    "rate_text",
]

GRID_STEPS: Final = 60
PAPER_RATE: Final = 2e-4
LONG_STEPS: Final = 120
GRID_PROBLEMS: Final = 48
LONG_PROBLEMS: Final = 100
LEAST_RATES: Final = 4  # learning rates of its own, without which a start is not compared
RATES: Final = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 2, 5))


@dataclass(frozen=True, kw_only=True)
class Start:
    """What `nlora_surgery init` is asked for.

    Attributes:
        method, rank, sampling, split, residual: the options of that name; None is the command's default.
        two_matrix: `--format lora`.
        folded: multiply lora_N into lora_B after init, by `nlora_surgery convert --to lora`.
    """

    method: str
    rank: int = 64
    sampling: str | None = None
    split: str | None = None
    residual: str = "baked"
    two_matrix: bool = False
    folded: bool = False

    @property
    def name(self) -> str:
        """Short and unique."""
        parts = [self.method, f"r{self.rank}", self.sampling, self.split]
        parts += ["lora" if self.two_matrix else None, "folded" if self.folded else None]
        return "-".join([*filter(None, parts), *([] if self.residual == "baked" else [self.residual])])

    def arguments(self, seed: int) -> list[str]:
        """Options for the command line of init."""
        given = {"--method": self.method, "--rank": self.rank, "--residual": self.residual, "--seed": seed}
        given |= {"--sampling": self.sampling, "--scale-split": self.split}
        options = [part for option, value in given.items() if value is not None for part in (option, str(value))]
        return [*options, "--format", "lora"] if self.two_matrix else options


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        start: where it starts from.
        mode: `--train`.
        lr: peak learning rate.
        steps: optimizer steps, of `batch_size` examples each.
        problems: of the test set, on which the loss is taken: the first so many.
        eval_steps: how often.
        seed: of the start and of the order of the data.
        dtype: of the base.
        batch_size: examples a step.
    """

    start: Start
    mode: str
    lr: float
    steps: int = GRID_STEPS
    problems: int = GRID_PROBLEMS
    eval_steps: int = GRID_STEPS
    seed: int = 0
    dtype: str = "bfloat16"
    batch_size: int = 4

    @property
    def name(self) -> str:
        """Short and unique; the key of its result."""
        return f"{self.start.name}-{self.mode}-lr{rate_text(self.lr)}-s{self.steps}-seed{self.seed}"

    def long(self, seed: int = 0) -> Run:
        """The run that counts, at the same learning rate."""
        return replace(self, steps=LONG_STEPS, problems=LONG_PROBLEMS, eval_steps=30, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One start, trained in one way, at a learning rate of its own.

    Attributes:
        start, mode: as in `Run`.
        first: the learning rate to begin the search with, one of `RATES`.
        always: learning rates that are tried wherever the search goes.
        long_seeds: of the long runs at the rate that the search finds.
    """

    start: Start
    mode: str
    first: float
    always: tuple[float, ...] = ()
    long_seeds: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{self.start.name}-{self.mode}"

    def short(self, lr: float) -> Run:
        """The run that tries a learning rate."""
        return Run(start=self.start, mode=self.mode, lr=lr)

    def next_rate(self, losses: Mapping[float, float]) -> float | None:
        """The learning rate to try next: downhill along `RATES`, until the best one lies between two worse ones.

        Args:
            losses: final loss by learning rate, of those tried; infinite where training failed.

        Returns:
            None once there are `LEAST_RATES` of them, `always` among them, and both neighbours of the best one are
            known.
        """
        if not losses:
            return self.first
        at = RATES.index(min(losses, key=losses.__getitem__))
        untried = [i for i, lr in enumerate(RATES) if lr not in losses]
        if not untried:
            return None

        def beside(i: int) -> float:
            """The loss beside the best one on the side of i: what is lower may go on falling."""
            return losses.get(RATES[at - 1 if i < at else at + 1], math.inf)

        nearest = min(untried, key=lambda i: (abs(i - at), beside(i)))
        if abs(nearest - at) == 1 or len(losses) < LEAST_RATES:
            return RATES[nearest]
        return next((lr for lr in self.always if lr not in losses), None)

    def long(self, lr: float) -> list[Run]:
        """The runs that count, at the learning rate that was found."""
        return [self.short(lr).long(seed) for seed in self.long_seeds]


@dataclass(frozen=True)
class Stage:
    """Trials that answer a question together.

    Attributes:
        name: of the question.
        trials: what is trained.
        others: runs without a search: best runs again with another seed, for a measure of what a difference means, and
            what should come out like something that was searched.
    """

    name: str
    trials: tuple[Trial, ...]
    others: tuple[Run, ...] = ()

    @property
    def work(self) -> tuple[Trial | Run, ...]:
        """All that there is to do."""
        return (*self.trials, *self.others)


def rate_text(lr: float, digits: int = 1) -> str:
    """A learning rate as the page and the runs' names have it, `2e-4`."""
    return f"{lr:.{digits - 1}e}".replace("e-0", "e-")


_NYSTROM: Final = Start(method="nystrom")
_OPTIMAL: Final = Start(method="nystrom-optimal")
_SKETCH_CORE: Final = Start(method="sketch", split="core")

STAGES: Final = (
    # What is subtracted from the base cancels, so that IntTune's gradients and Adam's steps depend on the sides alone:
    # those of nystrom-optimal are nystrom's, pissa's nearly those of a sketch. Of the first no run, of the other one.
    Stage(
        "inttune",
        (
            Trial(start=_NYSTROM, mode="inttune", first=2e-3, long_seeds=(0,)),
            Trial(start=_SKETCH_CORE, mode="inttune", first=5e-3, long_seeds=(0,)),
        ),
        others=(Run(start=Start(method="pissa", split="core"), mode="inttune", lr=1e-2),),
    ),
    Stage(
        "initialization",
        (
            Trial(start=Start(method="sketch"), mode="nlora", first=1e-4, long_seeds=(0,)),
            Trial(start=Start(method="lora"), mode="lora", first=2e-3, long_seeds=(0,)),
            Trial(start=_NYSTROM, mode="nlora", first=5e-5, long_seeds=(0,)),
            Trial(start=Start(method="slora"), mode="slora", first=2e-3, long_seeds=(0,)),
            Trial(start=Start(method="pissa", two_matrix=True), mode="lora", first=1e-4, long_seeds=(0,)),
            Trial(start=_OPTIMAL, mode="nlora", first=2e-4, long_seeds=(0,)),
            Trial(start=Start(method="pissa-fast"), mode="nlora", first=1e-4),
        ),
        others=(
            Run(start=Start(method="lora"), mode="lora", lr=2e-3, seed=1),
            Run(start=Start(method="sketch"), mode="nlora", lr=1e-4, seed=1),
            Run(start=_NYSTROM, mode="nlora", lr=5e-5, seed=1),
            Run(start=Start(method="slora"), mode="slora", lr=2e-3, seed=1),
        ),
    ),
    Stage(
        "core",
        (
            Trial(start=Start(method="nystrom-pinv"), mode="nlora", first=1e-4, long_seeds=(0,)),
            Trial(start=Start(method="nystrom", residual="none"), mode="nlora", first=1e-4),
        ),
        others=tuple(  # a virtual residual is a baked one that is not rounded: its rates are the same
            Run(start=Start(method=method, residual="virtual"), mode="nlora", lr=lr)
            for method, lr in (("nystrom", 5e-5), ("nystrom-pinv", 1e-4), ("nystrom-optimal", 2e-4))
        ),
    ),
    Stage(
        "rank",
        tuple(
            Trial(
                start=Start(method=method, rank=rank),
                mode=mode,
                first=first,
                # SLoRA only gets better with the rate there: two ranks show it, and r = 64.
                always=(PAPER_RATE,) if method == "nystrom" or rank in {8, 128} else (),
            )
            for rank, slora, nystrom in (
                (8, 2e-3, 5e-4),
                (128, 1e-3, 5e-5),
                (32, 2e-3, 2e-4),
                (4, 1e-2, 5e-3),
                (16, 5e-3, 5e-4),
            )
            for method, mode, first in (("slora", "slora", slora), ("nystrom", "nlora", nystrom))
        ),
    ),
    Stage("order", (Trial(start=Start(method="nystrom", folded=True), mode="lora", first=1e-4),)),
    Stage(
        "scale split",
        (
            Trial(start=_SKETCH_CORE, mode="nlora", first=1e-4),
            Trial(start=Start(method="nystrom-optimal", split="balanced"), mode="nlora", first=2e-4),
            Trial(start=Start(method="nystrom-optimal", split="core"), mode="nlora", first=1e-4),
        ),
    ),
    Stage(
        "inttune, rank",
        tuple(
            Trial(start=Start(method="sketch", split="core", rank=rank), mode="inttune", first=first)
            for rank, first in ((128, 2e-3), (256, 5e-4))
        ),
    ),
)
