"""The charts of `report`: drawn by matplotlib, put into the page as SVG in the page's own colours.

matplotlib draws in colours that stand for others; those take their place, so that light and dark are the page's affair.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from xml.etree import ElementTree

from nlora_surgery.errors import MissingExtraError
from nlora_surgery.markup import Html, tag

__all__ = ["DEPTHS", "energy_chart", "line_keys", "line_style", "loss_chart", "need_matplotlib", "values_chart"]

_STYLES: Final = ("-", "-", "-", "-", "--", "--", "--", ":", ":", ":", ":", "-.", "-.", "-.")  # beside seven colours
DEPTHS: Final = 5  # shades of a line, from the first layer to the last
_SVG: Final = "{http://www.w3.org/2000/svg}"

# What matplotlib draws in, and what takes its place on the page.
_TEXT, _GRID, _MARK = "#010101", "#010102", "#010103"
_COLOURS: Final = {
    _TEXT: "currentColor",
    _GRID: "var(--grid)",
    _MARK: "var(--mark)",
    **{f"#0102{index:02x}": f"var(--c{index})" for index in range(7)},
    **{f"#0103{index:02x}": f"var(--d{index})" for index in range(DEPTHS)},
}


def need_matplotlib() -> None:
    """Find out early whether the charts can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('the report draws with matplotlib: pip install "nlora-surgery[report]"') from error


def line_keys(lines: Sequence[tuple[str, str, str]]) -> Html:
    """Which line is whose: colour, style and name of each."""
    dashes = {"-": None, "--": "6 3", ":": "1.5 3", "-.": "6 3 1.5 3"}
    return tag(
        "ul",
        *(
            tag(
                "li",
                tag(
                    "svg",
                    tag("line", x1=0, y1=5, x2=28, y2=5, style=f"stroke:var({colour})", stroke_width=3,
                         stroke_dasharray=dashes[style]),
                    viewBox="0 0 28 10",
                    aria_hidden="true",
                ),
                name,
            )
            for colour, style, name in lines
        ),
        class_="keys",
    )  # fmt: skip


def line_style(index: int) -> str:
    """Matplotlib's style of the line of a number, for more lines than there are colours."""
    return _STYLES[index % len(_STYLES)]


def energy_chart(kinds: Sequence[Mapping[str, Any]], rank: int, most: int) -> Html:
    """Energy over rank, a line for each kind of module.

    Args:
        kinds: `curve` of each: the energy of rank 1, 2, …, from 0 to 1.
        rank: where the marker stands.
        most: the axis ends there.
    """

    def draw(axes: Any) -> None:
        for index, kind in enumerate(kinds):
            points = _thinned(len(kind["curve"]))
            energies = [100 * kind["curve"][point - 1] for point in points]
            axes.plot(
                [*points, most],
                [*energies, energies[-1]],
                color=f"#0102{index % 7:02x}",
                linestyle=line_style(index),
                linewidth=1.8,
            )
        axes.set(ylim=(0, 102), xlabel="rank", ylabel="energy captured, %")
        _rank_axis(axes, rank, most)

    return _chart("Energy captured by rank, a line for each kind of module", (4.9, 3.1), draw, rank=rank, most=most)


def values_chart(
    label: str, lines: Sequence[tuple[int, Sequence[float]]], rank: int, most: int, limits: tuple[float, float]
) -> Html:
    """Singular values by their number, a line for each weight, both axes logarithmic.

    Args:
        label: the kind of module.
        lines: shade, below `DEPTHS`, and values of each weight; zeros are left out.
        rank, most: as in `energy_chart`.
        limits: of the values' axis.
    """
    from matplotlib.ticker import LogLocator

    def draw(axes: Any) -> None:
        for depth, values in lines:
            points = [point for point in _thinned(len(values)) if values[point - 1] > 0]
            axes.plot(points, [values[point - 1] for point in points], color=f"#0103{depth:02x}", linewidth=1.4)
        axes.set(yscale="log", ylim=limits)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _rank_axis(axes, rank, most)

    return _chart(f"Singular values of {label} by number", (3.3, 2.1), draw, rank=rank, most=most)


def loss_chart(losses: Sequence[Sequence[float]], evals: Sequence[Sequence[float]]) -> Html:
    """Step and loss in training, and on the evaluation data; either may be empty."""

    def draw(axes: Any) -> None:
        for colour, points in (("#010200", losses), ("#010201", evals)):
            if points:
                kept = [points[index - 1] for index in _thinned(len(points), most=400, even=True)]
                axes.plot(*zip(*kept, strict=True), color=colour, linewidth=1.6, marker="o" if len(kept) < 20 else None,
                          markersize=3.5)  # fmt: skip
        axes.set(xlabel="step", ylabel="loss")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _chart("Loss by step", (4.9, 2.7), draw)


def _thinned(count: int, most: int = 60, *, even: bool = False) -> list[int]:
    """Numbers from 1 to `count`, at equal distances of their logarithms; all of them where they are few."""
    if count <= 1:
        return [1] * count
    share = (index / (most - 1) for index in range(most))
    return sorted({round(1 + part * (count - 1)) if even else round(count**part) for part in share})


def _rank_axis(axes: Any, rank: int, most: int) -> None:
    """Powers of two, and a line at the chosen rank."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, max(2, most))
    ticks = [2**power for power in range(0, max(1, most).bit_length(), 2)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.axvline(min(rank, most), color=_MARK, linewidth=1.4, linestyle="--", gid="rank-marker")


def _chart(
    title: str, size: tuple[float, float], draw: Callable[[Any], None], rank: int | None = None, most: int = 1
) -> Html:
    """An SVG element in the page's colours.

    Args:
        title: for those who do not see it.
        size: in inches of 72 points.
        draw: onto matplotlib's axes.
        rank, most: at what the rank's marker stands, and at most can.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and a `$` in a module's name is no formula.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "", "text.parse_math": False, "font.size": 11,
                "font.family": "sans-serif", "axes.unicode_minus": False}  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.minorticks_off()
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_TEXT, length=0)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set_color(_TEXT)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_TEXT)
        for patch in (figure.patch, axes.patch):
            patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        attributes = {"class": "chart", "role": "img", "aria-label": title}
        if rank is not None:
            marks = [axes.transData.transform((at, axes.get_ylim()[0]))[0] for at in (1, most)]
            attributes |= {
                "data-from": f"{marks[0]:.2f}",
                "data-to": f"{marks[1]:.2f}",
                "data-most": str(max(2, most)),
                "data-rank": str(min(rank, most)),
            }
    return _inline(buffer.getvalue(), attributes)


def _inline(text: str, attributes: Mapping[str, str]) -> Html:
    """An SVG of matplotlib's as an element of a page that has others of its kind."""
    ElementTree.register_namespace("", _SVG[1:-1])
    root = ElementTree.fromstring(text)
    for name in ("metadata", "defs"):
        for child in root.findall(f"{_SVG}{name}"):
            if name == "metadata" or child.find(f"{_SVG}style") is not None:
                root.remove(child)
    prefix = hashlib.sha256(text.encode()).hexdigest()[:8]
    referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    used = {name for pair in referred for name in pair if name}
    for element in root.iter():
        own = element.get("id")
        if own is not None:
            del element.attrib["id"]
            if own in used:
                element.set("id", f"{prefix}-{own}")
            if own == "rank-marker":
                element.set("class", "rank-marker")
        for key, value in list(element.attrib.items()):
            if key.endswith("href") and value.startswith("#"):
                del element.attrib[key]  # HTML knows no namespaces
                element.set("href", f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
            elif key == "d":
                element.set(key, re.sub(r"\d+\.\d{2,}", lambda match: f"{float(match[0]):.1f}", value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    for key, value in attributes.items():
        root.set(key, value)
    shown = ElementTree.tostring(root, encoding="unicode")
    for drawn, own in _COLOURS.items():
        shown = shown.replace(drawn, own)
    return Html(re.sub(r"\n\s*", "\n", shown))
