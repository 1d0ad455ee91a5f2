"""The command line. Verbs import what they need when they run, so that `dlm --help` is quick."""

from dlm.cli import generate, show, settle, train, evaluate, calibrate, curse, catalogue  # isort: skip  (the order of `dlm --help`)
from dlm.cli.app import app, main

__all__ = ["app", "calibrate", "catalogue", "curse", "evaluate", "generate", "main", "settle", "show", "train"]
