"""The same weights under another attention pattern: checkpoints of one config are read fully, block by block or causally."""

from __future__ import annotations

import copy

from dlm.errors import InputError
from dlm.models.transformer import Transformer


def reading(network: Transformer, attention: str, block_length: int = 0) -> Transformer:
    """A view of a network that shares its weights. InputError for blocks that do not divide the window."""
    if attention == network.config.attention and block_length in (0, network.config.block_length):
        return network
    try:
        config = network.config.with_(attention=attention, block_length=block_length)
    except ValueError as error:
        raise InputError(str(error)) from None
    view = copy.copy(network)  # modules and parameters are shared, the config is its own
    view.config = config
    return view
