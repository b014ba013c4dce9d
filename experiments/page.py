"""Put the results into docs/experiments.md: `python -m experiments.page`.

The page is prose with places for tables, `<!-- table: NAME -->` to `<!-- end -->`, which this fills from the results;
the pictures go to docs/experiments/. A test holds that the page's tables are those of the results.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from experiments import vision
from experiments.run import losses_by_rate, read_results
from experiments.table import LONG_STEPS, STAGES, Start, Trial, rate_text
from experiments.vision import mean_losses

__all__ = ["PAGE", "Trained", "draw_pictures", "fill", "language", "near_rates", "tables", "vision_transformer"]

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "experiments.md"

_NEAR: Final = 1.02  # of the best loss: the learning rates that do as well
_DIVERGED: Final = 100.0

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Trained:
    """What came of a trial.

    Attributes:
        start: the title of its start.
        mode: how it was trained.
        runs: all results, short and long, of all seeds.
        losses: final loss of the short runs, the mean where there are seeds, by ascending learning rate; infinite where
            training failed. Empty where only the beginning was looked at.
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


# --- what is compared --------------------------------------------------------------------------------------

# Of the language model: the start's name and the mode.
_LANGUAGE: Final = {
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
    "order": (("nystrom-r64", "nlora"), ("nystrom-r64-folded", "lora")),
}
_VISION: Final = {
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
    "rank": tuple(pair for r in (4, 8, 16, 32, 64) for pair in ((f"slora-r{r}", "slora"), (f"nystrom-r{r}", "nlora"))),
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

_Found = Mapping[tuple[str, str], Trained]


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


# --- tables ------------------------------------------------------------------------------------------------


def tables(words: _Found, images: _Found) -> dict[str, str]:
    """The tables of the page, by name, in Markdown.

    Args:
        words: from `language`.
        images: from `vision_transformer`.
    """
    made = {}
    for name, keys in _LANGUAGE.items():
        chosen = [words[key] for key in keys if key in words]
        searched = [each for each in chosen if each.losses]
        if name in {"starts", "core"}:
            made[f"language, {name}, before"] = _before(chosen)
        if len(searched) > 1:
            made[f"language, {name}"] = _grid(searched)
        if name in {"starts", "inttune"} and len([each for each in searched if each.long]) > 1:
            made[f"language, {name}, long"] = _long(searched)
    made["language, seeds"] = _seeds([words[key] for key in _LANGUAGE["starts"] if key in words and words[key].losses])
    made["language, rank"] = _ranks(words, (4, 8, 16, 32, 64, 128))
    for name, keys in _VISION.items():
        made[f"vision, {name}"] = _vision([images[key] for key in keys if key in images])
    return made | {"steps": _steps(words, images)}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _loss(value: float) -> str:
    return "diverged" if value > _DIVERGED else f"{value:.3f}"


def _figure(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _range_text(rates: Sequence[float]) -> str:
    return rate_text(rates[0]) if len(rates) == 1 else f"{rate_text(rates[0])} to {rate_text(rates[-1])}"


def _rates(chosen: Iterable[Trained]) -> list[float]:
    return sorted({lr for each in chosen for lr in each.losses})


def _cells(each: Trained, rates: Iterable[float]) -> list[str]:
    """The losses at some learning rates, the best in bold."""
    texts = {lr: _loss(loss) for lr, loss in each.losses.items()}
    texts[each.best_rate] = f"**{texts[each.best_rate]}**"
    return [texts.get(lr, "") for lr in rates]


def _before(chosen: Iterable[Trained]) -> str:
    rows = []
    for each in chosen:
        init = each.runs[0]["init"]
        first = next(run["eval"][0][1] for run in each.runs if run["run"]["steps"] != LONG_STEPS)
        figures = (("seconds", ".1f"), ("energy", ".1%"), ("delta_ratio", ".2f"), ("drift", ".1e"))
        rows.append([each.start, *(_figure(init[name], spec) for name, spec in figures), _loss(first)])
    return _table(("start", "init, s", "energy", "‖delta‖/‖weight‖", "drift", "loss before"), rows)


def _grid(chosen: Sequence[Trained]) -> str:
    rates = _rates(chosen)
    rows = [
        [
            each.start,
            each.mode,
            f"{each.runs[0]['trainable'] / 1e6:.2f} M",
            *_cells(each, rates),
            _loss(each.best_loss),
            _range_text(near_rates(each.losses)),
        ]
        for each in chosen
    ]
    return _table(("start", "trained", "parameters", *map(rate_text, rates), "best", "within 2 %"), rows)


def _long(chosen: Sequence[Trained]) -> str:
    rows = []
    for each in chosen:
        for run in sorted(each.long, key=lambda run: int(run["run"]["seed"])):
            losses = [_loss(loss) for _, loss in run["eval"]]
            rows.append([each.start, each.mode, rate_text(run["run"]["lr"]), *losses])
    return _table(("start", "trained", "lr", "before", "30", "60", "90", "120 steps"), rows)


def _seeds(chosen: Iterable[Trained]) -> str:
    rows = []
    for each in chosen:
        losses = [run["eval"][-1][1] for run in each.best]
        if len(losses) > 1:
            apart = (max(losses) - min(losses)) / min(losses)
            rows.append([each.start, rate_text(each.best_rate), *map(_loss, losses), f"{apart:.1%}"])
    return _table(("start", "lr", "first seed", "second", "apart"), rows)


def _ranks(words: _Found, ranks: Iterable[int]) -> str:
    rows = []
    for rank in ranks:
        pair = words.get((f"slora-r{rank}", "slora")), words.get((f"nystrom-r{rank}", "nlora"))
        if pair[0] is None or pair[1] is None:
            continue
        slora, nystrom = pair
        cells = [text for each in pair if each for text in (_loss(each.best_loss), rate_text(each.best_rate))]
        at_paper = [_loss(each.losses[2e-4]) if 2e-4 in each.losses else "" for each in (slora, nystrom)]
        delta = _figure(nystrom.runs[0]["init"]["delta_ratio"], ".2f")
        rows.append([str(rank), *cells, f"{nystrom.best_loss / slora.best_loss:.3f}", *at_paper, delta])
    head = ("r", "slora", "at lr", "nystrom", "at lr", "ratio", "slora at 2e-4", "nystrom at 2e-4", "‖delta‖/‖weight‖")
    return _table(head, rows)


def _vision(chosen: Sequence[Trained]) -> str:
    """Mean losses over the seeds, and their spread at the best rate."""
    rates = _rates(chosen)
    rows = []
    for each in chosen:
        best = each.best
        seeds = [run["after"]["loss"] for run in best]
        rows.append(
            [
                each.start,
                each.mode,
                f"{best[0]['trainable'] / 1000:.1f} k",
                _loss(best[0]["before"]["loss"]),
                *_cells(each, rates),
                f"{min(seeds):.3f} to {max(seeds):.3f}",
                _range_text(near_rates(each.losses)),
                f"{statistics.fmean(run['after']['accuracy'] for run in best):.1%}",
            ]
        )
    head = ("start", "trained", "parameters", "before", *map(rate_text, rates), "seeds", "within 2 %", "accuracy")
    return _table(head, rows)


def _stepped(found: _Found) -> list[tuple[Trained, float]]:
    """What was searched with a known first step, and that, of baked and virtual starts."""
    return [
        (each, step)
        for each in found.values()
        if each.losses and (step := each.step_per_rate) is not None and "no residual" not in each.start
    ]


def _steps(words: _Found, images: _Found) -> str:
    rows = [
        [
            model,
            each.start,
            each.mode,
            f"{step:.2f}",
            rate_text(each.best_rate),
            f"{step * each.best_rate:.2%}",
            _range_text(near_rates(each.losses)),
        ]
        for model, found in (("language", words), ("vision", images))
        for each, step in sorted(_stepped(found), key=lambda pair: pair[1])
    ]
    return _table(("model", "start", "trained", "step per lr", "best lr", "its first step", "within 2 %"), rows)


_PLACE: Final = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables made anew.

    Raises:
        KeyError: it has a place for a table that there is not.
    """
    return _PLACE.sub(lambda place: f"{place[1]}\n{made[place['name']]}\n{place[3]}", page)


# --- pictures ----------------------------------------------------------------------------------------------

_Curve = tuple[str, Sequence[tuple[float, float]]]


def draw_pictures(words: _Found, images: _Found, folder: Path) -> None:
    """Loss over learning rate, steps and rank, and best rate over first step, as SVG."""
    for kind, compared, found, what in (
        ("language", _LANGUAGE, words, "problems"),
        ("vision", _VISION, images, "images"),
    ):
        ylabel = f"loss on test {what}"
        for name, keys in compared.items():
            chosen = [found[key] for key in keys if key in found and found[key].losses]
            if name == "rank":
                continue
            by_rate: list[_Curve] = [(each.title, list(each.losses.items())) for each in chosen]
            _draw(folder / f"{kind}-{name}.svg", "peak learning rate", ylabel, _lines(by_rate))
            by_step: list[_Curve] = [(each.title, run["eval"]) for each in chosen for run in each.long[:1]]
            if name == "starts" and by_step:
                _draw(folder / f"{kind}-{name}-long.svg", "steps", ylabel, _lines(by_step, log=False))
        ranks = [
            (title, [(float(r), found[key].best_loss) for r in _RANKS if (key := (f"{title}-r{r}", mode)) in found])
            for title, mode in (("slora", "slora"), ("nystrom", "nlora"))
        ]
        _draw(folder / f"{kind}-rank.svg", "r", ylabel, _lines(ranks), ticks=_RANKS)
    _draw(
        folder / "steps.svg",
        "first step per unit of learning rate",
        "best learning rate",
        _rates_over_steps(words, images),
    )


_RANKS: Final = (4, 8, 16, 32, 64, 128)
_SHOWN: Final = 1.6  # losses above are off the pictures


def _draw(path: Path, xlabel: str, ylabel: str, draw: Callable[[Any], None], *, ticks: Sequence[float] = ()) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "nlora_surgery", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        draw(axes)
        if ticks:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _lines(curves: Sequence[_Curve], *, log: bool = True) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for (title, points), marker in zip(curves, itertools.cycle("osD^vPX"), strict=False):
            shown = [point for point in points if point[1] < _SHOWN]
            if shown:
                axes.plot(*zip(*shown, strict=True), marker=marker, markersize=5, label=title)
        if log:
            axes.set_xscale("log")

    return draw


def _rates_over_steps(words: _Found, images: _Found) -> Callable[[Any], None]:
    """A point for every trial, and for each model the line on which first steps are the same share of the weights."""

    def kind(each: Trained) -> str:
        raw = each.mode == "nlora" and re.fullmatch(r"nystrom(, r = \d+)?", each.start)
        return "raw nystrom" if raw else "inttune" if each.mode == "inttune" else "all others"

    def draw(axes: Any) -> None:
        for model, found, colour in (("language model", words, "C0"), ("vision transformer", images, "C1")):
            stepped = _stepped(found)
            for name, marker, face in (
                ("all others", "o", colour),
                ("inttune", "D", "none"),
                ("raw nystrom", "s", "none"),
            ):
                points = [(step, each.best_rate) for each, step in stepped if kind(each) == name]
                if points:
                    axes.loglog(
                        *zip(*points, strict=True), marker, markersize=5, color=colour, markerfacecolor=face,
                        label=f"{model}, {name}",
                    )  # fmt: skip
            shares = [step * each.best_rate for each, step in stepped if kind(each) == "all others"]
            if shares:
                share, steps = statistics.median(shares), [step for _, step in stepped]
                ends = [min(steps), max(steps)]
                axes.loglog(ends, [share / end for end in ends], "--", color=colour, label=f"first step of {share:.2%}")

    return draw


def main() -> None:
    """Fill the page and draw its pictures."""
    words = language(read_results().values())
    images = vision_transformer(read_results(vision.RESULTS).values())
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), tables(words, images)), encoding="utf-8")
    draw_pictures(words, images, PAGE.with_suffix(""))


if __name__ == "__main__":
    main()
