"""Autoregressive sampling: plain, and speculative decoding, whose text is token for token the same."""
