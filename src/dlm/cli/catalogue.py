"""`dlm list`."""

from __future__ import annotations

from pathlib import Path

from dlm.cli.app import app


@app.command(name="list")
def list_() -> None:
    """Checkpoints and adapters that come with dlm, bases that can be pulled or are here, and recipes that train more."""
    from dlm.adapters import attach, lora
    from dlm.formats import native
    from dlm.train import recipes

    for name, path in native.bundled().items():
        config = native.load_config(path)
        kind, size = _kind(config.objective, config.noise["process"], config.network.attention), config.training.get("parameters", 0)
        print(f"model   {name:24} {kind}, {size:,} parameters, window {config.network.window}, context {config.context}")
    for name, path in attach.bundled().items():
        about = lora.load_config(path)
        print(f"adapter {name:24} for {about.base}, {about.stride} tokens a call at most; dlm generate --base {about.base} --lossless")
    for name in native.PULLED:
        path = native.cache_directory() / f"{name}.gguf"
        here = f"autoregressive, {path.stat().st_size / 1e6:.0f} MB at {path}" if path.is_file() else f"not here yet: dlm pull {name}"
        print(f"base    {name:24} {here}")
    for name, make in recipes.RECIPES.items():
        settings = make()
        kind = _kind(settings.objective, settings.noise, settings.network.attention)
        print(f"recipe  {name:24} {kind}, {settings.steps} steps of {settings.batch} windows on {Path(settings.data).name}")


def _kind(objective: str, noise: str, attention: str) -> str:
    return objective if objective == "autoregressive" else f"{noise} {'block ' * (attention == 'block_causal')}diffusion"
