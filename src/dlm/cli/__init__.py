"""The command line. Verbs import their modules when they run, so that `dlm --help` is quick."""

from dlm.cli import (
    bench,
    calibrate,
    catalogue,
    chat,
    convert,
    curse,
    evaluate,
    export,
    generate,
    pull,
    samplers,
    schedule,
    serve,
    settle,
    show,
    solve,
    train,
    verify,
)
from dlm.cli.app import arrange, main

arrange(
    {
        "Write": ("generate", "chat", "solve", "serve", "show"),
        "Train": ("train", "convert", "export"),
        "Measure": ("eval", "settle", "curse", "calibrate", "schedule", "verify", "bench"),
        "Find": ("list", "samplers", "pull"),
    }
)

__all__ = [
    "bench",
    "calibrate",
    "catalogue",
    "chat",
    "convert",
    "curse",
    "evaluate",
    "export",
    "generate",
    "main",
    "pull",
    "samplers",
    "schedule",
    "serve",
    "settle",
    "show",
    "solve",
    "train",
    "verify",
]
