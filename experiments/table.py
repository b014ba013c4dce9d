"""The runs: which starts are trained how, in the order in which they answer something.

A stage compares starts in one respect. Its grid of short runs chooses a learning rate for every start, and its long
runs, whose learning rate is that choice, are what is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

__all__ = ["GRID_STEPS", "LONG_STEPS", "STAGES", "Run", "Stage", "Start", "rate_text"]

GRID_STEPS: Final = 60
LONG_STEPS: Final = 120
GRID_PROBLEMS: Final = 48
LONG_PROBLEMS: Final = 100


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
        lr: peak learning rate; None is the best of the grid's with the same start and mode.
        steps: optimizer steps, of `batch_size` examples each.
        problems: of the test set, on which the loss is taken: the first so many.
        eval_steps: how often.
        seed: of the start and of the order of the data.
        dtype: of the base.
        batch_size: examples a step.
    """

    start: Start
    mode: str
    lr: float | None
    steps: int = GRID_STEPS
    problems: int = GRID_PROBLEMS
    eval_steps: int = GRID_STEPS
    seed: int = 0
    dtype: str = "bfloat16"
    batch_size: int = 4

    @property
    def name(self) -> str:
        """Short and unique; the key of its result."""
        rate = "best" if self.lr is None else rate_text(self.lr)
        dtype = [] if self.dtype == "bfloat16" else [self.dtype]
        return "-".join([self.start.name, self.mode, f"lr{rate}", f"s{self.steps}", *dtype, f"seed{self.seed}"])

    def at(self, lr: float) -> Run:
        """The same at a learning rate."""
        return replace(self, lr=lr)

    def long(self, seed: int = 0) -> Run:
        """The run that counts, at the best learning rate of the grid."""
        return replace(self, lr=None, steps=LONG_STEPS, problems=LONG_PROBLEMS, eval_steps=30, seed=seed)


@dataclass(frozen=True)
class Stage:
    """Runs that may go in any order, after those of the stages before."""

    name: str
    runs: tuple[Run, ...]


def rate_text(lr: float) -> str:
    """A learning rate as the page and the runs' names have it, `2e-4`."""
    return f"{lr:.0e}".replace("e-0", "e-")


def _grid(rates: tuple[float, ...], mode: str, **start: Any) -> Iterator[Run]:
    for lr in rates:
        yield Run(start=Start(**start), mode=mode, lr=lr)


def _stages() -> Iterator[Stage]:
    plain = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    spectral = (1e-4, 2e-4, 5e-4, 1e-3)
    raw = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4)

    starts: list[tuple[tuple[float, ...], str, dict[str, Any]]] = [
        (plain, "lora", {"method": "lora"}),
        (plain, "slora", {"method": "slora"}),
        (raw, "nlora", {"method": "nystrom"}),
        (spectral, "nlora", {"method": "nystrom-optimal"}),
        (spectral, "lora", {"method": "pissa", "two_matrix": True}),
        (spectral, "nlora", {"method": "sketch"}),
    ]
    yield Stage("initialization", tuple(run for rates, mode, start in starts for run in _grid(rates, mode, **start)))
    yield Stage(
        "initialization, long",
        tuple(Run(start=Start(**start), mode=mode, lr=None).long() for _, mode, start in starts),
    )

    # Not nystrom-optimal: what is subtracted from the base cancels, so that IntTune's gradients and Adam's steps depend
    # on the sides alone, which are those of nystrom.
    cores: list[tuple[tuple[float, ...], dict[str, Any]]] = [
        ((5e-4, 1e-3, 2e-3, 5e-3), {"method": "nystrom"}),
        ((1e-3, 2e-3, 5e-3, 1e-2), {"method": "sketch", "split": "core"}),
        ((1e-3, 2e-3, 5e-3, 1e-2), {"method": "pissa", "split": "core"}),
    ]
    yield Stage("inttune", tuple(run for rates, start in cores for run in _grid(rates, "inttune", **start)))
    yield Stage("inttune, long", tuple(Run(start=Start(**start), mode="inttune", lr=None).long() for _, start in cores))

    yield Stage(
        "rank",
        tuple(
            run
            for rank in (4, 8, 16, 32, 128)
            for rates, mode, method in (
                ((5e-4, 1e-3, 2e-3), "slora", "slora"),
                ((1e-4, 2e-4, 5e-4), "nlora", "nystrom"),
            )
            for run in _grid(rates, mode, method=method, rank=rank)
        ),
    )

    yield Stage(
        "core",
        tuple(
            run
            for start in (
                {"method": "nystrom", "residual": "virtual"},
                {"method": "nystrom", "residual": "none"},
                {"method": "nystrom-pinv"},
                {"method": "nystrom-pinv", "residual": "virtual"},
                {"method": "nystrom-optimal", "residual": "virtual"},
            )
            for run in _grid((1e-4, 2e-4), "nlora", **start)
        ),
    )

    splits: list[tuple[tuple[float, ...], dict[str, Any]]] = [
        (spectral, {"method": "nystrom-optimal", "split": "balanced"}),
        (plain, {"method": "nystrom-optimal", "split": "core"}),
        (plain, {"method": "sketch", "split": "core"}),
        (spectral, {"method": "pissa-fast"}),
        (spectral, {"method": "pissa"}),
    ]
    yield Stage("scale split", tuple(run for rates, start in splits for run in _grid(rates, "nlora", **start)))

    folded: list[tuple[tuple[float, ...], dict[str, Any]]] = [
        (raw, {"method": "nystrom", "folded": True}),
        (spectral, {"method": "nystrom-optimal", "folded": True}),
    ]
    yield Stage("order", tuple(run for rates, start in folded for run in _grid(rates, "lora", **start)))


STAGES: Final = tuple(_stages())
