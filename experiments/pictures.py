"""The pictures of the page, as SVG."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from experiments.compare import LANGUAGE, RANKS, VISION, Found, Trained, with_steps
from experiments.table import PAPER_RATE, rate_text

__all__ = ["draw_pictures"]

_SHOWN: Final = 1.6  # losses above are off the pictures

_Curve = tuple[str, Sequence[tuple[float, float]]]


def draw_pictures(words: Found, images: Found, folder: Path) -> None:
    """Loss over learning rate, steps and rank, and best rate over first step, as SVG."""
    for kind, compared, found, what in (
        ("language", LANGUAGE, words, "problems"),
        ("vision", VISION, images, "images"),
    ):
        ylabel = f"loss on test {what}"
        for name, keys in compared.items():
            chosen = [found[key] for key in keys if key in found and found[key].losses]
            if name == "rank":
                _draw(folder / f"{kind}-rank.svg", "r", ylabel, _lines(_over_ranks(found)), ticks=RANKS)
                continue
            by_rate: list[_Curve] = [(each.title, list(each.losses.items())) for each in chosen]
            _draw(folder / f"{kind}-{name}.svg", "peak learning rate", ylabel, _lines(by_rate))
            by_step: list[_Curve] = [(each.title, run["eval"]) for each in chosen for run in each.long[:1]]
            if name == "starts" and by_step:
                _draw(folder / f"{kind}-{name}-long.svg", "steps", ylabel, _lines(by_step, log=False))
    _draw(
        folder / "steps.svg",
        "first step per unit of learning rate",
        "best learning rate",
        _rates_over_steps(words, images),
    )


def _over_ranks(found: Found) -> list[_Curve]:
    """Losses at the best learning rate of each rank, and at the paper's where there are any."""
    curves: list[_Curve] = []
    for at in (None, PAPER_RATE):
        for title, mode in (("slora", "slora"), ("nystrom", "nlora")):
            pairs = ((r, found[key]) for r in RANKS if (key := (f"{title}-r{r}", mode)) in found)
            rates = ((r, each, each.best_rate if at is None else at) for r, each in pairs)
            points = [(float(r), each.losses[lr]) for r, each, lr in rates if lr in each.losses]
            curves.append((f"{title}, {'best rate' if at is None else rate_text(at)}", points))
    return curves


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


def _rates_over_steps(words: Found, images: Found) -> Callable[[Any], None]:
    """A point for every trial, and for each model the line on which first steps are the same share of the weights."""

    def kind(each: Trained) -> str:
        raw = each.mode == "nlora" and re.fullmatch(r"nystrom(, r = \d+)?", each.start)
        return "raw nystrom" if raw else "inttune" if each.mode == "inttune" else "all others"

    def draw(axes: Any) -> None:
        for model, found, colour in (("language model", words, "C0"), ("vision transformer", images, "C1")):
            stepped = with_steps(found)
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
