"""Put the results into docs/experiments.md: `python -m experiments.page`.

The page is prose with places for tables, `<!-- table: NAME -->` to `<!-- end -->`, which this fills from the results;
the pictures go to docs/experiments/. A test holds that the page's tables are those of the results.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from experiments.run import RESULTS, read_results
from experiments.table import GRID_STEPS, LONG_STEPS, Start, rate_text

__all__ = [
    "PAGE",
    "VISION_RESULTS",
    "Trials",
    "draw_pictures",
    "draw_vision",
    "fill",
    "tables",
    "trials",
    "vision_tables",
]

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "experiments.md"
VISION_RESULTS: Final = RESULTS.with_name("vision.jsonl")

_LEAST_RATES: Final = 4  # learning rates of its own, without which a start is not compared
_NEAR: Final = 1.02  # of the best loss: the learning rates that do as well

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Trials:
    """All short runs of one start in one mode, and the long ones.

    Attributes:
        start, mode: what they have in common.
        init: what init said of the start.
        trainable: parameters.
        losses: final loss of the short runs by learning rate, ascending; infinite where training failed.
        start_loss: before the first step; None if there was no short run.
        long: the long runs: step and loss at every evaluation.
        long_rate: their learning rate.
    """

    start: Mapping[str, Any]
    mode: str
    init: Mapping[str, Any]
    trainable: int | None
    losses: Mapping[float, float]
    start_loss: float | None
    long: Sequence[Sequence[Sequence[float]]]
    long_rate: float | None

    @property
    def best(self) -> tuple[float, float]:
        """Lowest final loss of the short runs, and its learning rate."""
        return min((loss, lr) for lr, loss in self.losses.items())

    @property
    def near(self) -> list[float]:
        """The learning rates around the best one that come within 2 % of it."""
        rates = list(self.losses)
        loss, best = self.best
        at = rates.index(best)
        good = [self.losses[lr] <= _NEAR * loss for lr in rates]
        first = next((i + 1 for i in range(at, -1, -1) if not good[i]), 0)
        end = next((i for i in range(at, len(rates)) if not good[i]), len(rates))
        return rates[first:end]


def trials(results: Iterable[Result]) -> dict[tuple[str, str], Trials]:
    """Group results by start and mode: keys are the start's name and the mode."""

    def key(result: Result) -> tuple[str, str]:
        return Start(**result["run"]["start"]).name, result["run"]["mode"]

    usual = [result for result in results if result["run"]["dtype"] == "bfloat16"]
    found = {}
    for name, group in itertools.groupby(sorted(usual, key=key), key):
        runs = list(group)
        short = sorted(
            (run for run in runs if run["run"]["steps"] == GRID_STEPS and run["run"]["seed"] == 0),
            key=lambda run: float(run["run"]["lr"]),
        )
        long = [run for run in runs if run["run"]["steps"] == LONG_STEPS and "failed" not in run]
        found[name] = Trials(
            start=runs[0]["run"]["start"],
            mode=name[1],
            init=runs[0]["init"],
            trainable=next((run["trainable"] for run in runs if "trainable" in run), None),
            losses={run["run"]["lr"]: float("inf") if "failed" in run else run["eval"][-1][1] for run in short},
            start_loss=short[0]["eval"][0][1] if short else None,
            long=[run["eval"] for run in long],
            long_rate=long[0]["run"]["lr"] if long else None,
        )
    return found


# --- tables ------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _loss(value: float | None) -> str:
    if value is None:
        return ""
    return "diverged" if value > _DIVERGED else f"{value:.3f}"


_DIVERGED: Final = 100.0


def _title(trial: Trials) -> str:
    start = trial.start
    words = [start["method"], start["split"], "two matrices" if start["two_matrix"] else None]
    residual = None if start["residual"] == "baked" else f"{start['residual']} residual"
    return ", ".join(filter(None, [*words, residual]))


def _figure(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _starts(chosen: Sequence[Trials]) -> str:
    rows = [
        [
            _title(trial),
            _figure(trial.init["seconds"], ".1f"),
            _figure(trial.init["energy"], ".1%"),
            _figure(trial.init["delta_ratio"], ".2f"),
            _figure(trial.init["drift"], ".1e"),
            _loss(trial.start_loss),
        ]
        for trial in chosen
    ]
    return _table(("start", "init, s", "energy", "‖delta‖/‖weight‖", "drift", "loss before"), rows)


def _grid(chosen: Sequence[Trials]) -> str:
    rates = sorted({lr for trial in chosen for lr in trial.losses})
    rows = []
    for trial in chosen:
        loss, best = trial.best
        near = trial.near
        span = f"{rate_text(near[0])} to {rate_text(near[-1])}" if len(near) > 1 else rate_text(near[0])
        cells = [f"**{_loss(found)}**" if lr == best else _loss(found) for lr, found in trial.losses.items()]
        by_rate = dict(zip(trial.losses, cells, strict=True))
        rows.append([_title(trial), *(by_rate.get(lr, "") for lr in rates), _loss(loss), span])
    return _table(("start", *map(rate_text, rates), "best", "within 2 %"), rows)


def _long(chosen: Sequence[Trials]) -> str:
    rows = []
    for trial in chosen:
        if not trial.long:
            continue
        assert trial.long_rate is not None
        steps = [step for step, _ in trial.long[0]]
        means = [statistics.fmean(run[i][1] for run in trial.long) for i in range(len(steps))]
        last = [run[-1][1] for run in trial.long]
        spread = f"{min(last):.3f} to {max(last):.3f}" if len(last) > 1 else "one seed"
        parameters = "" if trial.trainable is None else f"{trial.trainable / 1e6:.2f} M"
        rows.append([_title(trial), parameters, rate_text(trial.long_rate), *map(_loss, means), spread])
    evaluations = ("before", "30", "60", "90", "120 steps")
    return _table(("start", "trainable", "lr", *evaluations, "seeds"), rows)


def _ranks(found: Mapping[tuple[str, str], Trials]) -> str:
    rows = []
    for rank in (4, 8, 16, 32, 64, 128):
        pair = [found.get((f"slora-r{rank}", "slora")), found.get((f"nystrom-r{rank}", "nlora"))]
        if not all(trial and trial.losses for trial in pair):
            continue
        cells = []
        for trial in pair:
            assert trial is not None
            loss, lr = trial.best
            cells += [_loss(loss), rate_text(lr)]
        both = [trial for trial in pair if trial is not None]
        at_paper = [_loss(trial.losses.get(2e-4)) for trial in both]
        ratio = both[1].best[0] / both[0].best[0]
        delta = _figure(both[1].init["delta_ratio"], ".2f")
        rows.append([str(rank), *cells, f"{ratio:.3f}", *at_paper, delta])
    if len(rows) < 2:
        return ""
    head = ("r", "slora", "at lr", "nystrom", "at lr", "ratio", "slora at 2e-4", "nystrom at 2e-4", "‖delta‖/‖weight‖")
    return _table(head, rows)


_INITIALIZATION: Final = (
    ("lora-r64", "lora"),
    ("slora-r64", "slora"),
    ("nystrom-r64", "nlora"),
    ("nystrom-optimal-r64", "nlora"),
    ("pissa-r64-lora", "lora"),
    ("sketch-r64", "nlora"),
)
_INTTUNE: Final = (
    ("nystrom-r64", "inttune"),
    ("sketch-r64-core", "inttune"),
    ("pissa-r64-core", "inttune"),
)
_CORE: Final = (
    ("nystrom-r64", "nlora"),
    ("nystrom-r64-virtual", "nlora"),
    ("nystrom-r64-none", "nlora"),
    ("nystrom-pinv-r64", "nlora"),
    ("nystrom-pinv-r64-virtual", "nlora"),
    ("nystrom-optimal-r64", "nlora"),
    ("nystrom-optimal-r64-virtual", "nlora"),
)
_SPLITS: Final = (
    ("nystrom-optimal-r64", "nlora"),
    ("nystrom-optimal-r64-balanced", "nlora"),
    ("nystrom-optimal-r64-core", "nlora"),
    ("sketch-r64", "nlora"),
    ("sketch-r64-core", "nlora"),
    ("pissa-r64", "nlora"),
    ("pissa-fast-r64", "nlora"),
)


def tables(results: Iterable[Result]) -> dict[str, str]:
    """The tables of the page, by name, in Markdown; those whose runs have not all begun are left out."""
    found = trials(results)

    def some(names: Iterable[tuple[str, str]]) -> list[Trials]:
        return [found[name] for name in names if name in found and len(found[name].losses) >= _LEAST_RATES]

    compared = {"initialization": _INITIALIZATION, "inttune": _INTTUNE, "core": _CORE, "splits": _SPLITS}
    made = {}
    for name, names in compared.items():
        chosen = some(names)
        if len(chosen) == len(names) or (name == "initialization" and len(chosen) > 1):
            made[f"{name}, starts"] = _starts(chosen)
            made[f"{name}, grid"] = _grid(chosen)
        if len(chosen) == len(names) and all(trial.long for trial in chosen):
            made[f"{name}, long"] = _long(chosen)
    return made | ({"rank": ranks} if (ranks := _ranks(found)) else {})


# Of the vision transformer: which starts, in which mode, a table compares.
_VISION: Final = {
    "starts": (
        ("lora-r16", "lora"),
        ("slora-r16", "slora"),
        ("nystrom-r16", "nlora"),
        ("nystrom-optimal-r16", "nlora"),
        ("pissa-r16-lora", "lora"),
        ("sketch-r16", "nlora"),
    ),
    "inttune": (
        ("lora-r16", "lora"),
        ("nystrom-r16", "inttune"),
        ("nystrom-optimal-r16", "inttune"),
        ("sketch-r16-core", "inttune"),
    ),
    "rank": tuple(pair for r in (4, 8, 16, 32, 64) for pair in ((f"slora-r{r}", "slora"), (f"nystrom-r{r}", "nlora"))),
    "core": tuple(
        (f"{method}-r16{residual}", "nlora")
        for residual in ("", "-none")
        for method in ("nystrom", "nystrom-pinv", "nystrom-optimal")
    ),
    "splits": (
        ("nystrom-optimal-r16", "nlora"),
        ("nystrom-optimal-r16-balanced", "nlora"),
        ("nystrom-optimal-r16-core", "nlora"),
        ("sketch-r16", "nlora"),
        ("sketch-r16-core", "nlora"),
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


def vision_tables(results: Iterable[Result]) -> dict[str, str]:
    """The tables of the vision transformer, by name: mean losses over the seeds, and their spread at the best rate."""
    found = _by_rate(results)
    return {
        f"vision, {name}": _vision_table([(start, mode, found[start, mode]) for start, mode in names])
        for name, names in _VISION.items()
        if all(each in found for each in names)
    }


_ByRate = Mapping[float, Sequence[Result]]


def _by_rate(results: Iterable[Result]) -> dict[tuple[str, str], dict[float, list[Result]]]:
    """The runs of every start and mode, a list of all seeds for each learning rate, ascending."""
    found: dict[tuple[str, str], dict[float, list[Result]]] = {}
    for result in sorted(results, key=lambda result: float(result["run"]["lr"])):
        run = result["run"]
        found.setdefault((run["start"], run["mode"]), {}).setdefault(float(run["lr"]), []).append(result)
    return found


def _mean_losses(by_rate: _ByRate) -> dict[float, float]:
    return {lr: statistics.fmean(run["after"]["loss"] for run in runs) for lr, runs in by_rate.items()}


def _vision_table(rows: Sequence[tuple[str, str, _ByRate]]) -> str:
    rates = sorted({lr for _, _, by_rate in rows for lr in by_rate})
    lines = []
    for start, mode, by_rate in rows:
        means = _mean_losses(by_rate)
        best = min(means, key=means.__getitem__)
        cells = {lr: f"**{_loss(mean)}**" if lr == best else _loss(mean) for lr, mean in means.items()}
        losses = [run["after"]["loss"] for run in by_rate[best]]
        accuracy = statistics.fmean(run["after"]["accuracy"] for run in by_rate[best])
        lines.append(
            [
                _VISION_TITLES.get(start, start.replace("-r16", "")),
                mode,
                f"{by_rate[best][0]['trainable'] / 1000:.1f} k",
                _loss(by_rate[best][0]["before"]["loss"]),
                *(cells.get(lr, "") for lr in rates),
                f"{min(losses):.3f} to {max(losses):.3f}",
                f"{accuracy:.1%}",
            ]
        )
    return _table(("start", "trained", "parameters", "before", *map(rate_text, rates), "seeds", "accuracy"), lines)


_VISION_TITLES: Final = {"pissa-r16-lora": "pissa, two matrices"}


_PLACE: Final = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables made anew.

    Raises:
        KeyError: it has a place for a table that there is not.
    """
    return _PLACE.sub(lambda place: f"{place[1]}\n{made[place['name']]}\n{place[3]}", page)


# --- pictures ----------------------------------------------------------------------------------------------


def _draw(
    path: Path, xlabel: str, draw: Callable[[Any], None], *, ticks: Sequence[float] = (), what: str = "problems"
) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "nlora_surgery", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=f"loss on test {what}")
        draw(axes)
        if ticks:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _curves(chosen: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, log: bool) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for (title, points), marker in zip(chosen, itertools.cycle("osD^vPX"), strict=False):
            shown = [point for point in points if point[1] < _SHOWN]
            axes.plot(*zip(*shown, strict=True), marker=marker, markersize=5, label=title)
        if log:
            axes.set_xscale("log")

    return draw


_SHOWN: Final = 1.6  # losses above are off the pictures


def draw_vision(results: Iterable[Result], folder: Path) -> None:
    """The vision transformer's losses over the learning rate, and at the best one over the rank, as SVG."""
    found = _by_rate(results)
    for name in ("starts", "inttune"):
        if all(each in found for each in _VISION[name]):
            curves = [
                (
                    _VISION_TITLES.get(start, start.replace("-r16", "")) + (", inttune" if mode == "inttune" else ""),
                    list(_mean_losses(found[start, mode]).items()),
                )
                for start, mode in _VISION[name]
            ]
            _draw(folder / f"vision-{name}.svg", "peak learning rate", _curves(curves, log=True), what="images")
    if all(each in found for each in _VISION["rank"]):
        best = {each: min(_mean_losses(found[each]).values()) for each in _VISION["rank"]}
        curves = [
            (title, [(float(start.partition("-r")[2]), loss) for (start, _), loss in best.items() if title in start])
            for title in ("slora", "nystrom")
        ]
        ticks = [rank for rank, _ in curves[0][1]]
        _draw(folder / "vision-rank.svg", "r", _curves(curves, log=True), ticks=ticks, what="images")


def draw_pictures(results: Iterable[Result], folder: Path) -> None:
    """Loss over learning rate, over steps and over rank, as SVG."""
    found = trials(results)

    for name, names in (("initialization", _INITIALIZATION), ("inttune", _INTTUNE), ("splits", _SPLITS)):
        chosen = [found[each] for each in names if each in found and len(found[each].losses) >= _LEAST_RATES]
        if len(chosen) < len(names) and name != "initialization":
            continue
        by_rate = [(_title(trial), list(trial.losses.items())) for trial in chosen]
        if name == "inttune":
            by_rate.append(("lora, all of it", list(found["lora-r64", "lora"].losses.items())))
        _draw(folder / f"{name}-rates.svg", "peak learning rate", _curves(by_rate, log=True))
        by_step = [(_title(trial), [(step, loss) for step, loss in run]) for trial in chosen for run in trial.long[:1]]
        if by_step:
            _draw(folder / f"{name}-steps.svg", "steps", _curves(by_step, log=False))
    ranks = (4, 8, 16, 32, 64, 128)
    series: list[tuple[str, Sequence[tuple[float, float]]]] = []
    for title, mode in (("slora", "slora"), ("nystrom", "nlora")):
        points = [
            (float(rank), found[f"{title}-r{rank}", mode].best[0])
            for rank in ranks
            if (f"{title}-r{rank}", mode) in found and found[f"{title}-r{rank}", mode].losses
        ]
        series.append((title, points))
    if all(len(points) > 1 for _, points in series):
        _draw(folder / "rank.svg", "r", _curves(series, log=True), ticks=ranks)


def main() -> None:
    """Fill the page and draw its pictures."""
    results, vision = list(read_results().values()), list(read_results(VISION_RESULTS).values())
    made = tables(results) | vision_tables(vision)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    draw_pictures(results, PAGE.with_suffix(""))
    draw_vision(vision, PAGE.with_suffix(""))


if __name__ == "__main__":
    main()
