"""Adapters of an autoregressive base, trained and loaded beside it: gated LoRA, Medusa heads, and their training."""
