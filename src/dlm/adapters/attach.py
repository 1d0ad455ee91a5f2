"""Find an adapter or Medusa heads, by directory or bundled name, and attach them to the base that they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlm import bundled
from dlm.adapters import files, medusa
from dlm.adapters.lora import CONFIG, WEIGHTS, adapter_state, fingerprint, load_adapter, load_config
from dlm.errors import InputError
from dlm.models.transformer import Transformer


def bundled_for(network: Transformer) -> Path | None:
    """The first bundled adapter that was made for this base; None without one, and for quantized weights, which have no fingerprint."""
    found = {} if network.quantized else bundled.adapters()
    own = fingerprint(network) if found else ""
    return next((path for path in found.values() if load_config(path).fingerprint == own), None)


def begin_with(network: Transformer, path: str | Path) -> None:
    """Copy the adapter of a directory or a bundled name into the one that is attached; a chain that it lacks stays as it is.

    InputError as `load_adapter`, and for one of other sizes.
    """
    found = find(network, path)
    files.check_base(load_config(found), fingerprint(network), f"the adapter in {found} was")
    state = files.read_weights(found / WEIGHTS)
    own = {name: tensor for name, tensor in adapter_state(network).items() if name in state or not name.startswith("chain.")}
    files.fill(own, state, found / WEIGHTS, found / CONFIG)


def find(network: Transformer, path: str | Path) -> Path:
    """A directory, or that of a bundled name, or of the one bundled for this base, `auto`. InputError for none."""
    found: Path | None = Path(path)
    if not Path(path).is_dir():
        found = bundled_for(network) if str(path) == "auto" else bundled.adapters().get(str(path))
    if found is None:
        names = ", ".join(bundled.adapters()) or "none"
        raise InputError(f"no adapter {str(path)!r} for this base; bundled: {names}. A directory works too (dlm convert makes one).")
    return found


def with_adapter(lm: Any, path: str | Path) -> Any:
    """A `LanguageModel` with an adapter attached to its network, or heads: of a directory, a bundled name, or `auto` for what is
    bundled for this base. InputError as `load_adapter`."""
    found = find(lm.network, path)
    has_heads = (found / medusa.CONFIG).is_file()
    if has_heads:
        lm.heads = medusa.load_heads(found, lm.network)
    if not has_heads or (found / CONFIG).is_file():
        load_adapter(found, lm.network, lm.tokenizer.mask_id)
    return lm
