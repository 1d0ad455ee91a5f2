"""Where a checkpoint lies, by its name. Imports no torch, so that a misspelt name is answered at once."""

from __future__ import annotations

import difflib
from pathlib import Path

from dlm import bundled
from dlm.errors import InputError
from dlm.files import read_json


def find(name: str) -> Path:
    """Directory or GGUF file of a checkpoint: a path, a bundled or pulled name, or a hub id (downloaded once into the hub cache)."""
    return here(name) or _downloaded(name)


def here(name: str) -> Path | None:
    """As `find`, None for what may be a hub id. InputError for a name that is neither."""
    path = Path(name)
    if (path / "config.json").is_file() or (path.suffix in (".gguf", ".pt") and path.is_file()):
        return path
    if (found := bundled.models().get(name)) is not None:
        return found
    if path.is_dir():
        raise InputError(f"{name} has no config.json: it is no checkpoint (a training run writes one at its first save)")
    if name in bundled.BASES:
        path = bundled.cache_directory() / f"{name}.gguf"
        if not path.is_file():
            raise InputError(f"{name} is not here yet: run dlm pull {name}")
        return path
    if may_be_hub_id(name):
        return None
    close = difflib.get_close_matches(name, [*bundled.models(), *bundled.BASES], n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"bundled: {', '.join(bundled.models()) or 'none'}."
    raise InputError(f"no checkpoint {name!r}; {hint} A directory or a hub id works too.")


def may_be_hub_id(name: str) -> bool:
    """Whether it is written OWNER/NAME, and no path that says that it is one."""
    return name.count("/") == 1 and not name.endswith((".gguf", ".pt")) and not name.startswith(("/", ".", "~"))


def check_pullable(name: str) -> None:
    """InputError for a name that `dlm pull` has nothing to fetch for."""
    if name in bundled.BASES or name in bundled.models() or may_be_hub_id(name) or Path(name).exists():
        return
    close = difflib.get_close_matches(name, bundled.BASES, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"known by name: {', '.join(bundled.BASES)}."
    raise InputError(f"nothing to fetch by the name {name!r}; {hint} Any other model: its hub id, OWNER/NAME.")


def _downloaded(name: str) -> Path:
    """The directory of a hub id. InputError where the hub does not give it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        path = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not (path / "config.json").is_file() or read_json(path / "config.json").get("model_type") == "dlm":
            return path
        if not any(path.glob("*.safetensors")):  # older checkpoints, of which tensors alone are unpickled
            snapshot_download(name, allow_patterns=["pytorch_model.bin"])
        # another project's chat template may be a file of its own, which runs in a sandbox, and so may its merges
        return Path(snapshot_download(name, allow_patterns=["*.jinja", "merges.txt"]))
    except (OSError, HFValidationError) as error:
        raise InputError(f"no directory {name}, and the hub did not give it: {str(error).splitlines()[0]}") from None
