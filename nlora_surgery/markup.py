"""HTML elements as text, every string in them escaped unless it is HTML already."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

__all__ = ["Html", "join", "table_head", "tag"]


class Html(str):
    """Text that is HTML already; every other string is escaped where it goes in."""

    __slots__ = ()


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """An element; `class_` is `class`, `aria_label` is `aria-label`, True an attribute without a value."""
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(str(value))}"')
    opened = f"<{' '.join(words)}>"
    if name in {"input", "br"}:
        return Html(opened)
    inside = "".join(each if isinstance(each, Html) else html.escape(str(each)) for each in content)
    return Html(f"{opened}{inside}</{name}>")


def table_head(*names: str) -> Html:
    """A `thead` of one row."""
    return tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))


def join(parts: Iterable[Any]) -> Html:
    """One after the other, a line each."""
    return Html("\n".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))
