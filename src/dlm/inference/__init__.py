"""Faster, smaller or batch-invariant networks for decoding: one technique, one file; `prepare` applies them."""

from dlm.inference.preparation import prepare

__all__ = ["prepare"]
