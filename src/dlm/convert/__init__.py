"""Autoregressive checkpoints of other libraries, and what makes diffusers of them."""
