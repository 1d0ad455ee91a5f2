"""The decoding benchmark: methods side by side, other engines on the same weights, and the prompts."""
