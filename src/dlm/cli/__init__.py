"""The command line. Verbs import what they need when they run, so that `dlm --help` is quick."""

from dlm.cli import generate, chat, show, settle, train, evaluate, calibrate, curse, schedule, pull, convert, serve, bench, catalogue  # isort: skip  (the order of `dlm --help`)
from dlm.cli.app import app, main

__all__ = [
    "app",
    "bench",
    "calibrate",
    "catalogue",
    "chat",
    "convert",
    "curse",
    "evaluate",
    "generate",
    "main",
    "pull",
    "schedule",
    "serve",
    "settle",
    "show",
    "train",
]
