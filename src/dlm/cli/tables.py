"""Tables that the verbs print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

WIDE = 160  # columns of a table that goes into a pipe or a file


def console(as_json: bool = False) -> Console:
    """For tables: on the error stream beside JSON; where that is no terminal, wide enough that no column is lost."""
    made = Console(stderr=as_json)
    return made if made.is_terminal else Console(stderr=as_json, width=WIDE)


def table(*heads: str, title: str | None = None, caption: str | None = None, width: int = 0, numbers: bool = False) -> Table:
    """Without a frame; the first column, at least so wide, stays on one line. numbers: so do the others, right-aligned."""
    made = Table(box=None, header_style="bold", title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, head in enumerate(heads):
        figure = numbers and index > 0
        made.add_column(
            head, justify="right" if figure else "left", no_wrap=figure or index == 0, min_width=None if index else width or None
        )
    return made
