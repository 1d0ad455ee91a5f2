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
        kind, size = _kind(config.objective, config.noise["process"], config.network.attention), config.training.get("parameters", 0)
        print(f"model   {name:24} {kind}, {size:,} parameters, window {config.network.window}, context {config.context}")
    for name, make in recipes.RECIPES.items():
        settings = make()
        kind = _kind(settings.objective, settings.noise, settings.network.attention)
        print(f"recipe  {name:24} {kind}, {settings.steps} steps of {settings.batch} windows on {Path(settings.data).name}")


def _kind(objective: str, noise: str, attention: str) -> str:
    return objective if objective == "autoregressive" else f"{noise} {'block ' * (attention == 'block_causal')}diffusion"
