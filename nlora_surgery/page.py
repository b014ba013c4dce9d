"""The page of `report`: figures in, one HTML text out, with everything in it and nothing loaded from anywhere.

Text from files reaches the page through `markup.tag` alone, which escapes it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any, Final

from nlora_surgery.charts import (
    DEPTHS,
    energy_chart,
    line_keys,
    line_style,
    loss_chart,
    need_matplotlib,
    values_chart,
)
from nlora_surgery.markup import Html, join, table_head, tag
from nlora_surgery.spectra import Place, mean_of_known, place, place_labels
from nlora_surgery.version import VERSION

__all__ = ["GENERATOR", "render"]

GENERATOR: Final = "nlora_surgery report"

_HEAT_STEPS: Final = 10  # as many as templates/report.css has


def render(found: Mapping[str, Any]) -> str:
    """The page.

    Args:
        found: as `report.gather` gives it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    need_matplotlib()
    sections = [*_training(found), *_change(found), *_start(found), *_ranks(found), _reading(found)]
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in sections]
    what, lead, tiles, facts = _DESCRIPTIONS[found["kind"]](found)
    head = tag(
        "header",
        tag("p", f"{GENERATOR}: {what}", class_="over"),
        tag("h1", found["name"]),
        tag("p", lead, class_="lead"),
        tag("nav", tag("ul", *links), aria_label="Sections"),
    )
    notes = [tag("ul", *(tag("li", note) for note in found["notes"]), class_="notes")] if found["notes"] else []
    body = tag(
        "main",
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles), class_="tiles"),
        _facts(facts),
        *notes,
        *(tag("section", tag("h2", title, id=key), *content, aria_labelledby=key) for key, title, content in sections),
        id="main",
    )
    foot = tag("footer", f"Made by nlora_surgery {VERSION}. Everything is in this file; it loads nothing.")
    folder = resources.files("nlora_surgery") / "templates"
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((folder / "report.html").read_text(encoding="utf-8")).substitute(
        generator=GENERATOR,
        title=html.escape(f"{found['name']} · {GENERATOR}"),
        script_hash=f"sha256-{digest}",
        style=(folder / "report.css").read_text(encoding="utf-8"),
        body=join([head, body, foot]),
        script=script,
        data=_script_json(_on_page(found)),
    )


# --- the page's figures for its script --------------------------------------------------


def _script_json(value: Any) -> str:
    """JSON that no parser of HTML takes for the end of its script, or for a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _on_page(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that go with the page: all but the singular values, of which the charts show what there is to see."""
    spectra = found.get("spectra")
    if spectra is None:
        return dict(found)
    modules = [{name: value for name, value in each.items() if name != "values"} for each in spectra["modules"]]
    return {**found, "spectra": {**spectra, "modules": modules}}


def _facts(facts: Iterable[tuple[str, Any]]) -> Html:
    return tag("dl", *(part for name, value in facts for part in (tag("dt", name), tag("dd", value))), class_="facts")


def _table(key: str, title: Any, text: Any, *content: Html, class_: str | None = None) -> Html:
    """A table below its title; what is too wide for a phone scrolls by itself, by keyboard too.

    Args:
        key: an id that no other table has.
        title, text: what it is, and how to read it.
        content: of the table.
        class_: of the table.
    """
    table = tag("table", *content, class_=class_, aria_labelledby=key)
    scrolled = tag("div", table, class_="scroll", role="region", aria_labelledby=key, tabindex="0")
    small = [tag("small", text)] if text else []
    return tag("figure", tag("figcaption", tag("span", title, id=key), *small), scrolled)


def _figure(value: float | None, text: str, **attributes: Any) -> Html:
    """A number as it is shown, with all of its digits for machines."""
    return tag("data", text, value="" if value is None else repr(value), **attributes)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _amount(value: float, unit: str = "") -> str:
    """`20.4 M`; templates/report.js does the same."""
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}".strip()


def _bytes(count: float) -> str:
    return _amount(count, "B")


# --- what it is ------------------------------------------------------------------------------------------

_Description = tuple[str, str, list[tuple[str, str]], list[tuple[str, Any]]]


def _describe_checkpoint(found: Mapping[str, Any]) -> _Description:
    described = found["described"]
    spectra, rank = found["spectra"], str(found["rank"])
    adapted = sum(kind["modules"] for kind in spectra["kinds"])
    dtypes = ", ".join(f"{dtype} {_amount(count)}" for dtype, count in described["dtypes"].items())
    tiles = [
        ("parameters", _amount(described["parameters"])),
        ("weights to adapt", f"{adapted:,}"),
        (f"energy that rank {rank} can capture", _percent(spectra["energy"][rank])),
        (f"SLoRA parameters at rank {rank}", _amount(spectra["costs"][rank]["slora"])),
    ]
    facts = [
        ("model type", described["model_type"] or "not given"),
        ("stored as", f"{dtypes}, {_amount(sum(described['files'].values()), 'B')} in {len(described['files'])} files"),
        ("fingerprint", tag("code", described["fingerprint"])),
    ]
    return "a checkpoint", "What adapters of any rank could capture of its weights, and what they cost.", tiles, facts


def _describe_prepared(found: Mapping[str, Any]) -> _Description:
    described = found["described"]
    options, adapter = described["options"], described["adapter"]
    tiles = [("rank", str(options["rank"])), *_start_tiles(found), ("trainable", _amount(_trainable(adapter)))]
    facts = [
        ("made from", described["source"]["name"]),
        ("method", _method(options)),
        ("fingerprint of the base", tag("code", described["base_fingerprint"])),
    ]
    return "an output of init", "What its start captured, and what other ranks would.", tiles, facts


def _describe_adapter(found: Mapping[str, Any]) -> _Description:
    described, change = found["described"], found["change"]
    tiles = [("rank", str(described["r"])), ("modules", f"{len(change['modules']):,}"),
             ("parameters", _amount(_trainable(described)))]  # fmt: skip
    facts: list[tuple[str, Any]] = [
        ("format", f"{described['format']}, {described['matrices']} matrices"),
        ("lora_alpha", f"{described['lora_alpha']:g}{' (rsLoRA)' if described['use_rslora'] else ''}"),
        ("residual", described["residual"] or "none subtracted"),
        ("made for", described["base"] or "a base that it does not name"),
    ]
    if "start" in found:
        facts.append(("start", _method(found["start"]["options"])))
    return "an adapter", "What it adds to each weight.", tiles, facts


def _describe_run(found: Mapping[str, Any]) -> _Description:
    _, _, tiles, facts = _describe_adapter(found)
    training = found["training"]
    finished = training["report"]
    losses, evals = training["losses"], training["eval_losses"]
    steps = int(max((step for step, _ in [*losses, *evals]), default=0))
    tiles = [("rank", tiles[0][1]), ("steps", f"{steps:,}")]
    if losses:
        tiles.append(("training loss, first to last", f"{losses[0][1]:.3f} → {losses[-1][1]:.3f}"))
    if len(evals) > 1:
        tiles.append(("evaluation loss", f"{evals[0][1]:.3f} → {evals[-1][1]:.3f}"))
    if finished:
        tiles.append(("trained parameters", _amount(finished["trainable"])))
        facts = [("trained", finished["mode"]), *facts]
    lead = "How the loss fell, and which modules moved." if finished else "A run that has not finished."
    return "a run of train", lead, tiles, facts


_DESCRIPTIONS: Final[Mapping[str, Callable[[Mapping[str, Any]], _Description]]] = {
    "checkpoint": _describe_checkpoint,
    "prepared": _describe_prepared,
    "adapter": _describe_adapter,
    "run": _describe_run,
}


def _method(options: Mapping[str, Any]) -> str:
    return (
        f"{options['method']}, {options['sampling']} sampling, {options['scale_split']} split, {options['residual']} "
        f"residual, seed {options['seed']}"
    )


def _trainable(described: Mapping[str, Any]) -> int:
    """Parameters of an adapter, without the start that a virtual residual keeps."""
    return int(described["parameters"]) // (2 if described["residual"] == "virtual" else 1)


def _start_tiles(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    means = {
        figure: mean_of_known(module[figure] for module in found["start"]["modules"])
        for figure in ("energy", "delta_ratio", "drift")
    }
    return [
        ("energy captured, mean", _percent(means["energy"])),
        ("‖delta‖/‖weight‖, mean", "-" if means["delta_ratio"] is None else f"{means['delta_ratio']:.3f}"),
        ("drift, mean", "-" if means["drift"] is None else f"{means['drift']:.1e}"),
    ]


# --- sections --------------------------------------------------------------------------------------------

_Section = tuple[str, str, list[Html]]


def _training(found: Mapping[str, Any]) -> list[_Section]:
    training = found.get("training")
    if training is None:
        return []
    losses, evals = training["losses"], training["eval_losses"]
    if not losses and not evals:
        return [("training", "Training", [tag("p", "The run has logged no loss yet.")])]
    chart = loss_chart(losses, evals)
    keys = [("--c0", "-", "training")] * bool(losses) + [("--c1", "-", "evaluation")] * bool(evals)
    content = [
        tag(
            "figure",
            tag("figcaption", "Loss by step"),
            line_keys(keys),
            chart,
            class_="wide",
        )
    ]
    rows = [
        (name, points[0][1], min(value for _, value in points), points[-1][1], len(points))
        for name, points in (("training", losses), ("evaluation", evals))
        if points
    ]
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", _figure(value, f"{value:.4f}")) for value in values),
            tag("td", f"{count:,}"),
        )
        for name, *values, count in rows
    ]
    head = table_head("loss", "first", "least", "last", "logged")
    table = _table("losses", "The same in numbers", "", head, tag("tbody", *body))
    return [("training", "Training", [*content, table])]


def _change(found: Mapping[str, Any]) -> list[_Section]:
    change = found.get("change")
    if change is None or not change["modules"]:
        return []
    modules = change["modules"]
    moved = change["since"] == "start"
    title = "Which modules moved" if moved else "What the adapter adds"
    if moved and not any(module["norm"] for module in modules):
        return [("change", title, [tag("p", "None: the adapter stands where it started.")])]
    relative = all(module["ratio"] is not None for module in modules)
    figure = "ratio" if relative else "norm"
    size = "‖delta − its start‖" if moved else "‖delta‖"
    maps = [
        _heat(
            modules,
            figure,
            f"{size}{'/‖weight‖' if relative else ''}",
            "How far training has moved what the adapter adds." if moved else "The size of what the adapter adds.",
        ),
        _heat(
            modules,
            "rank90",
            f"Ranks that hold 90 % of {'the movement' if moved else '‖delta‖²'}",
            "Far fewer than the rank: a smaller one would have done. As many as it can be: more may help.",
        ),
    ]
    return [("change", title, maps)]


def _start(found: Mapping[str, Any]) -> list[_Section]:
    start = found.get("start")
    if start is None:
        return []
    modules = start["modules"]
    maps = [
        (
            "energy",
            "Energy captured, %",
            "The share of ‖weight‖² that the start captures. Below zero, its residual is larger than the weight.",
        ),
        (
            "delta_ratio",
            "‖delta‖/‖weight‖",
            "The size of the start. Where it is large, the residual is too, and rounding it costs more.",
        ),
        (
            "drift",
            "Drift",
            "‖effective − original‖/‖weight‖: what storing the residual has cost; zero where none is stored.",
        ),
    ]
    shown = [
        _heat(modules, figure, title, text)
        for figure, title, text in maps
        if any(module[figure] is not None for module in modules)
    ]
    intro = tag("p", "As init measured it, for every module: layers from left to right, modules from top to bottom.")
    return [("start", "What the start captured", [intro, *shown])]


def _ranks(found: Mapping[str, Any]) -> list[_Section]:
    spectra = found.get("spectra")
    if spectra is None:
        return []
    rank, kinds = found["rank"], spectra["kinds"]
    most = max((len(kind["curve"]) for kind in kinds), default=1)
    chooser = tag(
        "div",
        tag("label", "Rank", for_="rank"),
        tag("input", type="range", id="rank", min=1, max=most, step=1, value=rank),
        tag(
            "input",
            type="number",
            id="rank-number",
            min=1,
            max=most,
            step=1,
            value=rank,
            aria_label="Rank, as a number",
        ),
        class_="chooser",
        id="chooser",
        hidden=True,
    )
    lines = [(f"--c{index % 7}", line_style(index), kind["kind"]) for index, kind in enumerate(kinds)]
    energy = tag(
        "figure",
        tag(
            "figcaption",
            "Energy that the best product of a rank captures",
            tag("small", "Means by kind of module; the vertical line is the chosen rank."),
        ),
        line_keys(lines),
        energy_chart(kinds, rank, most),
        class_="wide",
    )
    sampled = tag("p", _sampling(spectra), class_="soft")
    narrow = len({place(module["module"]).layer for module in spectra["modules"]}) <= 8
    return [
        (
            "ranks",
            "What a rank captures and costs",
            [
                chooser,
                tag("div", energy, _best_map(found), class_="pair") if narrow else join([energy, _best_map(found)]),
                _at_rank(found),
                _by_rank(found),
                sampled,
                *_spectra(found),
            ],
        )
    ]


def _at_rank(found: Mapping[str, Any]) -> Html:
    """Energy and costs of each kind of module at one rank."""
    spectra, rank = found["spectra"], str(found["rank"])
    captured = _captured(found)
    header = ["module", "out × in", "weights", "energy, at best", *(["energy of the start"] if captured else []),
              "LoRA", "SLoRA, NLoRA", "IntTune", "file, fp32"]  # fmt: skip

    def costs(name: str, sums: Mapping[str, int]) -> list[Html]:
        return [
            tag("td", _figure(sums[what], _amount(sums[what], unit), data_figure=f"{name}.{what}"))
            for what, unit in (("lora", ""), ("slora", ""), ("inttune", ""), ("adapter_bytes", "B"))
        ]

    def share(name: str, value: float | None) -> Html:
        bar = f"--p:{100 * (value or 0):.4g}%"
        return tag("td", _figure(value, _percent(value), data_figure=f"{name}.energy"), class_="bar", style=bar)

    def start(label: str | None) -> list[Html]:
        value = captured.get(label)
        return [tag("td", _figure(value, _percent(value)))] if captured else []

    rows = [
        tag(
            "tr",
            tag("th", kind["kind"], scope="row"),
            tag("td", _shapes(kind["shapes"])),
            tag("td", f"{kind['modules']:,}"),
            share(f"kind{index}", kind["energy"][rank]),
            *start(kind["kind"]),
            *costs(f"kind{index}", kind["costs"][rank]),
        )
        for index, kind in enumerate(spectra["kinds"])
    ]
    total = tag(
        "tr",
        tag("th", "all", scope="row"),
        tag("td", ""),
        tag("td", f"{sum(kind['modules'] for kind in spectra['kinds']):,}"),
        share("all", spectra["energy"][rank]),
        *start(None),
        *costs("all", spectra["costs"][rank]),
    )
    own = f" The start's own energy is that of rank {found['start']['options']['rank']}." if captured else ""
    return _table(
        "at-rank",
        join(["At rank", tag("span", rank, data_rank_text=True)]),
        f"Trainable parameters, and bytes of an SLoRA file; twice as many with a virtual residual.{own}",
        table_head(*header),
        tag("tbody", *rows),
        tag("tfoot", total),
    )


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{shape[0]} × {shape[1]}" for shape in shapes[:2]) + (", …" if len(shapes) > 2 else "")


def _captured(found: Mapping[str, Any]) -> dict[str | None, float | None]:
    """The mean energy of the start by kind of module, and over all modules as None; empty if there is none."""
    modules = found["start"]["modules"] if "start" in found else []
    if all(module["energy"] is None for module in modules):
        return {}
    labels = place_labels(place(module["module"]) for module in modules)
    groups: dict[str | None, list[float | None]] = {None: [module["energy"] for module in modules]}
    for module in modules:
        where = place(module["module"])
        groups.setdefault(labels[where.stack, where.kind], []).append(module["energy"])
    return {label: mean_of_known(values) for label, values in groups.items()}


def _by_rank(found: Mapping[str, Any]) -> Html:
    """Energy of each kind of module, and costs of all, at several ranks."""
    spectra, chosen = found["spectra"], found["rank"]
    ranks = spectra["ranks"]

    def cells(values: Mapping[str, Any], text: Callable[[Any], str]) -> list[Html]:
        return [
            tag(
                "td",
                _figure(values[str(r)], text(values[str(r)])),
                data_rank=r,
                class_="chosen" if r == chosen else None,
            )
            for r in ranks
        ]

    head = [tag("th", f"r = {r}", scope="col", data_rank=r, class_="chosen" if r == chosen else None) for r in ranks]
    rows = [
        tag("tr", tag("th", kind["kind"], scope="row"), *cells(kind["energy"], _percent)) for kind in spectra["kinds"]
    ]
    costs = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *cells({r: sums[what] for r, sums in spectra["costs"].items()}, write),
        )
        for name, what, write in (
            ("LoRA parameters", "lora", _amount),
            ("SLoRA, NLoRA parameters", "slora", _amount),
            ("IntTune parameters", "inttune", _amount),
            ("SLoRA file, fp32", "adapter_bytes", _bytes),
        )
    ]
    return _table(
        "by-rank",
        "Rank by rank",
        "The most energy that a rank can capture, and what it costs in all.",
        tag("thead", tag("tr", tag("th", "module", scope="col"), *head)),
        tag("tbody", *rows),
        tag("tfoot", tag("tr", tag("th", "all", scope="row"), *cells(spectra["energy"], _percent)), *costs),
    )


def _best_map(found: Mapping[str, Any]) -> Html:
    """The heat map of energies that the chosen rank can capture, in the layers that were measured."""
    spectra, rank = found["spectra"], found["rank"]
    modules = [
        {
            "module": module["module"],
            "best": module["curve"][min(rank, len(module["curve"])) - 1],
            "index": index,
        }
        for index, module in enumerate(spectra["modules"])
    ]
    title = join(["Energy at rank", tag("span", rank, data_rank_text=True), "at best, %"])
    return _heat(modules, "best", title, "In the layers that were measured.", domain=(0.0, 1.0), follows=True)


def _sampling(spectra: Mapping[str, Any]) -> str:
    """How the spectra were found."""
    kinds = spectra["kinds"]
    measured, modules = (sum(kind[what] for kind in kinds) for what in ("measured", "modules"))
    layers = "every layer" if spectra["layers"] is None else f"{spectra['layers']} layers of each kind"
    text = f"Measured on {measured:,} of {modules:,} weights: {layers}, the first and the last among them. "
    if measured == modules:
        text = f"Measured on all {modules:,} weights. "
    inexact = [kind["kind"] for kind in kinds if not kind["exact"]]
    if not inexact:
        text += "Their spectra are exact."
    else:
        text += (
            f"The spectra of {', '.join(inexact)} are sketched, from seed {spectra['seed']}: energies are never too "
            "high. Where that was measured they were too low by 0.4 % of ‖weight‖² at most up to rank 64, 0.9 % up to "
            "rank 128 and 2.3 % up to rank 256."
        )
    if spectra["of"] == "residuals":
        text += " The original weights were put together again: the residual plus the product of the start."
    if spectra["not_finite"]:
        text += f" Left out, because they are not finite: {', '.join(spectra['not_finite'])}."
    return text


def _spectra(found: Mapping[str, Any]) -> list[Html]:
    """The singular values, a chart for each kind of module and in it a line for each layer."""
    spectra = found["spectra"]
    most = max((len(module["curve"]) for module in spectra["modules"]), default=1)
    labels = place_labels(place(module["module"]) for module in spectra["modules"])
    groups: dict[str, list[tuple[Place, Mapping[str, Any]]]] = {}
    for module in spectra["modules"]:
        where = place(module["module"])
        groups.setdefault(labels[where.stack, where.kind], []).append((where, module))
    highest = max((module["values"][0] for module in spectra["modules"]), default=1.0)
    lowest = min(
        (value for module in spectra["modules"] for value in module["values"] if value > highest / 60), default=0.1
    )
    charts = []
    for label, members in groups.items():
        layers = sorted({where.layer for where, _ in members})
        depth = {layer: round(index * (DEPTHS - 1) / max(1, len(layers) - 1)) for index, layer in enumerate(layers)}
        lines = [(depth[where.layer], module["values"]) for where, module in members]
        shown = ", ".join(map(str, layers)) if len(layers) <= 8 else f"{layers[0]} to {layers[-1]}"
        note = f"layer{'s' if len(layers) > 1 else ''} {shown}"
        charts.append(
            tag(
                "figure",
                tag("figcaption", label, tag("small", note)),
                values_chart(label, lines, found["rank"], most, (lowest / 1.2, highest * 1.2)),
            )
        )
    intro = tag(
        "p",
        "Singular values relative to ‖weight‖, by their number; both axes logarithmic. The stronger a line, the deeper "
        "its layer; the vertical line is the chosen rank. A spectrum that falls steeply is captured by few ranks.",
    )
    return [tag("h3", "Spectra", id="spectra"), intro, tag("div", *charts, class_="charts")]


def _reading(found: Mapping[str, Any]) -> _Section:
    terms = [
        (
            "energy",
            "The share of ‖weight‖² that a product captures: 1 − ‖weight − product‖²/‖weight‖². The best product of "
            "rank r is that of the r largest singular values.",
        ),
        ("delta", "What the adapter adds to a weight: scaling · lora_B · lora_N · lora_A."),
        ("LoRA, SLoRA, NLoRA", "Two matrices, r (in + out) parameters for each weight; or three, r² more."),
        ("IntTune", "Three matrices of which lora_N alone is trained, r² parameters."),
    ]
    if "start" in found:
        terms.append(("drift", "‖effective − original‖/‖weight‖, where effective is what is stored plus the product."))
    return ("reading", "How to read this", [_facts(terms)])


# --- heat maps -------------------------------------------------------------------------------------------


def _heat(
    modules: Sequence[Mapping[str, Any]],
    figure: str,
    title: str,
    text: str,
    *,
    domain: tuple[float, float] | None = None,
    follows: bool = False,
) -> Html:
    """Layers × modules as tables, one for each stack of layers, the numbers in the cells.

    Args:
        modules: each with its `module` and the figure; of several in one cell the mean is shown.
        figure: which.
        title, text: the caption.
        domain: of the colours; from the least value to the greatest by default.
        follows: whether the cells change with the chosen rank; then each module has its `index`.
    """
    known = [module[figure] for module in modules if module[figure] is not None]
    low, high = domain or (min(known, default=0.0), max(known, default=0.0))
    write, unit = _cell_format(figure, known)
    stacks: dict[str, dict[str, dict[int, list[Mapping[str, Any]]]]] = {}
    for module in modules:
        where = place(module["module"])
        stacks.setdefault(where.stack, {}).setdefault(where.kind, {}).setdefault(where.layer, []).append(module)
    swatches = tag("span", *(tag("i", class_=f"h{step}") for step in range(_HEAT_STEPS)), aria_hidden="true")
    scale = tag("span", write(low), swatches, write(high), class_="scale")
    tables = []
    for number, (stack, kinds) in enumerate(stacks.items()):
        layers = sorted({layer for cells in kinds.values() for layer in cells})
        head = [tag("th", stack or "layer", scope="col")]
        head += [tag("th", "mean", scope="col", class_="mean")] * (not follows)
        head += [tag("th", layer if stack else "", scope="col") for layer in layers]
        rows = []
        for kind, cells in kinds.items():
            row = [tag("th", kind, scope="row")]
            if not follows:
                mean = mean_of_known(module[figure] for members in cells.values() for module in members)
                row.append(tag("td", _figure(mean, "-" if mean is None else write(mean)), class_="mean"))
            row += [_cell(cells.get(layer, []), figure, write, (low, high), follows=follows) for layer in layers]
            rows.append(tag("tr", *row))
        body = [tag("thead", tag("tr", *head)), tag("tbody", *rows)]
        key = f"map-{figure}-{number}".replace("_", "-")
        if number:
            tables.append(_table(key, stack or "outside of the layers", "", *body, class_="heat"))
        else:
            caption = join([title, f"({unit})"]) if unit else title
            tables.append(_table(key, caption, join([text, tag("br"), scale]), *body, class_="heat"))
    return join(tables)


def _cell(
    members: Sequence[Mapping[str, Any]],
    figure: str,
    write: Callable[[float], str],
    domain: tuple[float, float],
    *,
    follows: bool,
) -> Html:
    value = mean_of_known(module[figure] for module in members)
    if value is None:
        return tag("td", _figure(None, "-" if members else ""))
    low, high = domain
    share = (value - low) / (high - low) if high > low else 0.0
    step = max(0, min(_HEAT_STEPS - 1, math.floor(share * _HEAT_STEPS)))
    indices = " ".join(str(module["index"]) for module in members) if follows else None
    return tag("td", _figure(value, write(value)), class_=f"h{step}", data_module=indices)


def _cell_format(figure: str, values: Sequence[float]) -> tuple[Callable[[float], str], str]:
    """How the numbers of one map are written, short enough for a cell, and in what unit."""
    if figure in {"energy", "best"}:
        return (lambda value: f"{100 * value:.0f}"), ""
    if figure == "rank90":
        return (lambda value: f"{value:.0f}"), ""
    largest = max((abs(value) for value in values), default=0.0)
    if not largest or 0.1 <= largest < 1000:
        digits = 2 if largest < 10 else 1 if largest < 100 else 0
        return (lambda value: f"{value:.{digits}f}"), ""
    exponent = math.floor(math.log10(largest))
    sign = "−" if exponent < 0 else ""
    power = "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(abs(exponent)))
    return (lambda value: f"{value / 10.0**exponent:.2f}"), f"in units of 10{sign.replace('−', '⁻')}{power}"
