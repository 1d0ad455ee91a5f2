"""`dlm list`."""

from __future__ import annotations

from pathlib import Path

from dlm.cli.app import app


@app.command(name="list")
def list_() -> None:
    """Checkpoints that come with dlm, and recipes that train more."""
    from dlm import recipes
    from dlm.models import checkpoint

    for name, path in checkpoint.bundled().items():
        config = checkpoint.load_config(path)
        size = config.training.get("parameters", 0)
        print(f"model   {name:24} {config.objective}, {size:,} parameters, window {config.network.window}, context {config.context}")
    for name, make in recipes.RECIPES.items():
        config_ = make()
        print(f"recipe  {name:24} {config_.objective}, {config_.steps} steps of {config_.batch} windows on {Path(config_.data).name}")
