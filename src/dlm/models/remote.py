"""A bidirectional network that a checkpoint brings as code of its own, called through transformers.

Shapes: B batch, Q positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dlm.errors import InputError
from dlm.models.wrapped import WrappedNetwork


class RemoteNetwork(WrappedNetwork):
    """`inner` takes `input_ids` and `attention_mask` and returns `logits`; `config` describes it."""

    @property
    def embed(self) -> Any:  # type: ignore[override]
        return self.inner.get_input_embeddings()

    def forward(
        self,
        z_BQ: Tensor,
        t_B: Tensor | None = None,
        *,
        valid_BT: Tensor | None = None,
        at_BQ: Tensor | None = None,
        index_BC: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """Logits (B, Q, V), or (B, C, V) at index_BC. InputError for caches and attention patterns, which this code does not have."""
        if asked := sorted(name for name, value in how.items() if value is not None and name != "pos_BQ"):
            raise InputError(f"a network of a checkpoint's own code has no {', '.join(asked)}: leave caches and checking samplers away")
        padding = {} if valid_BT is None else {"attention_mask": valid_BT.long()}
        logits_BQV: Tensor = self.inner(input_ids=z_BQ, **padding).logits
        if index_BC is None:
            return logits_BQV
        return logits_BQV.gather(1, index_BC[..., None].expand(-1, -1, logits_BQV.shape[-1]))
