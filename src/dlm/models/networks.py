"""The networks that a config.json may name, each with its config."""

from __future__ import annotations

from dlm.models.adaln import AdaLN, AdaLNConfig
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer

CONFIGS: dict[str, type[TransformerConfig]] = {"Transformer": TransformerConfig, "AdaLN": AdaLNConfig}


def name_of(config: TransformerConfig) -> str:
    """As config.json has it under `architectures`."""
    return next(name for name, kind in CONFIGS.items() if type(config) is kind)


def make(config: TransformerConfig) -> Transformer:
    """The network of a config, with fresh weights."""
    return AdaLN(config) if isinstance(config, AdaLNConfig) else Transformer(config)
