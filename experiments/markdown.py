"""The tables of the page, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from experiments.compare import ALIKE, LANGUAGE, RANKS, VISION, Found, Trained, near_rates, with_steps
from experiments.table import LONG_STEPS, PAPER_RATE, rate_text
from nlora_surgery.training.trainer import auto_rate

__all__ = ["tables"]

_DIVERGED: Final = 100.0


def tables(words: Found, images: Found) -> dict[str, str]:
    """The tables of the page, by name, in Markdown.

    Args:
        words: from `language`.
        images: from `vision_transformer`.
    """
    made = {}
    for name, keys in LANGUAGE.items():
        chosen = [words[key] for key in keys if key in words]
        searched = [each for each in chosen if each.losses]
        if name in {"starts", "core"}:
            made[f"language, {name}, before"] = _before(chosen)
        if len(searched) > 1:
            made[f"language, {name}"] = _grid(searched)
        if name in {"starts", "inttune"} and len([each for each in searched if each.long]) > 1:
            made[f"language, {name}, long"] = _long(searched)
    made["language, seeds"] = _seeds([words[key] for key in LANGUAGE["starts"] if key in words and words[key].losses])
    made["language, rank, best"] = _ranks(words)
    made |= {f"language, {name}, alike": _alike(words, pairs) for name, pairs in ALIKE.items()}
    for name, keys in VISION.items():
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


def _ranks(words: Found) -> str:
    rows = []
    for rank in RANKS:
        keys = (f"slora-r{rank}", "slora"), (f"nystrom-r{rank}", "nlora")
        if not all(key in words for key in keys):
            continue
        slora, nystrom = (words[key] for key in keys)
        best = [text for each in (slora, nystrom) for text in (_loss(each.best_loss), rate_text(each.best_rate))]
        at_paper = [_loss(each.losses[PAPER_RATE]) if PAPER_RATE in each.losses else "" for each in (slora, nystrom)]
        delta = _figure(nystrom.runs[0]["init"]["delta_ratio"], ".2f")
        rows.append([str(rank), *best, f"{nystrom.best_loss / slora.best_loss:.3f}", *at_paper, delta])
    paper = [f"{title} at {rate_text(PAPER_RATE)}" for title in ("slora", "nystrom")]
    return _table(("r", "slora", "at lr", "nystrom", "at lr", "ratio", *paper, "‖delta‖/‖weight‖"), rows)


def _alike(words: Found, pairs: Mapping[tuple[str, str], tuple[str, str]]) -> str:
    """Runs without a search, beside what was searched at the same learning rate."""
    rows = []
    for key, searched in pairs.items():
        if key in words:
            each, other = words[key], words[searched]
            for run in each.runs:
                lr, loss = run["run"]["lr"], run["eval"][-1][1]
                rows.append([each.start, other.start, rate_text(lr), f"{loss:.4f}", f"{other.losses[lr]:.4f}"])
    return _table(("start", "beside", "lr", "loss", "loss beside"), rows)


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


def _steps(words: Found, images: Found) -> str:
    rows = []
    for model, found in (("language", words), ("vision", images)):
        for each, step in sorted(with_steps(found), key=lambda pair: pair[1]):
            auto = auto_rate(each.mode, step)
            loss = each.loss_at(auto)
            rows.append(
                [
                    model,
                    each.start,
                    each.mode,
                    f"{step:.2f}",
                    rate_text(each.best_rate),
                    f"{step * each.best_rate:.2%}",
                    _range_text(near_rates(each.losses)),
                    rate_text(auto, digits=2),
                    _figure(None if loss is None else loss / each.best_loss - 1, "+.1%"),
                ]
            )
    head = ("model", "start", "trained", "step per lr", "best lr", "its first step", "within 2 %", "auto", "its loss")
    return _table(head, rows)
