"""Put the results into docs/experiments.md: `python -m experiments.page`.

The page is prose with places for tables, `<!-- table: NAME -->` to `<!-- end -->`, which this fills from the results;
the pictures go to docs/experiments/. A test holds that the page's tables are those of the results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from experiments import vision
from experiments.compare import language, vision_transformer
from experiments.markdown import tables
from experiments.pictures import draw_pictures
from experiments.run import read_results

__all__ = ["PAGE", "fill"]

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "experiments.md"

_PLACE: Final = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables made anew.

    Raises:
        KeyError: it has a place for a table that there is not.
    """
    return _PLACE.sub(lambda place: f"{place[1]}\n{made[place['name']]}\n{place[3]}", page)


def main() -> None:
    """Fill the page and draw its pictures."""
    words = language(read_results().values())
    images = vision_transformer(read_results(vision.RESULTS).values())
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), tables(words, images)), encoding="utf-8")
    draw_pictures(words, images, PAGE.with_suffix(""))


if __name__ == "__main__":
    main()
