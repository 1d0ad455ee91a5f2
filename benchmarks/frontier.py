"""Validation against epochs for the bundled twins, read from the logs that lie beside the checkpoints.

    python benchmarks/frontier.py

The training loop's validation: a part of the validation windows, fixed masks, averaged weights; nats per character, a bound for the
masked model. `dlm eval` gives the final figures on the whole split. The last line is one JSON object.
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from dlm import bundled


def curve(name: str) -> list[dict[str, float]]:
    """Lines of a log that hold a validation."""
    lines = (bundled.models()[name] / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "val_nats" in record]


def main() -> None:
    curves = {name: curve(name) for name in ("shakespeare-mask", "shakespeare-ar")}
    table = Table("epochs", *curves, box=None)
    rows = sorted((record["epochs"], name, record) for name, records in curves.items() for record in records)
    for epochs, name, record in rows:
        value = f"{record['val_nats']:.3f} +- {record['val_stderr']:.3f}"
        table.add_row(f"{epochs:.1f}", *(value if name == column else "" for column in curves))
    Console().print(table)
    print(json.dumps(curves))


if __name__ == "__main__":
    main()
