"""`dlm pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from dlm.cli.app import app, err
from dlm.formats.find import check_pullable


@app.command()
def pull(name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m, or a hub id (OWNER/NAME).")]) -> None:
    """Fetch a base model once.

    `dlm.load` and every verb then find it by its name.
    """
    check_pullable(name)  # before torch is loaded
    from dlm.formats.pull import pull as fetch

    print(fetch(name, lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True)))
