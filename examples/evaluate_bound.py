"""Evaluate a diffusion model on a text: an upper bound on its negative log-likelihood, beside the exact value of a baseline.

python examples/evaluate_bound.py [WINDOWS] [TEXT]
"""

import sys

import dlm

windows = int(sys.argv[1]) if len(sys.argv) > 1 else 32
text = sys.argv[2] if len(sys.argv) > 2 else "shakespeare"

# The last tenth of the text is for validation, as in training. Two passes draw other masks on the same windows.
for name in ("shakespeare-mask", "shakespeare-uniform", "shakespeare-ar"):
    found = dlm.evaluate(name, text, split="val", passes=2, max_windows=windows)
    sign = "<=" if found.is_bound else "= "
    print(f"{name:20} {sign} {found.nats_per_token:.3f} +- {found.stderr:.3f} nats per token, {found.bits_per_char:.3f} bits per character")

# Block diffusion has a bound for every block length, down to the exact likelihood of blocks of one token.
for length in (1, 16, 256):
    found = dlm.evaluate("shakespeare-block", text, split="val", passes=2, max_windows=windows, block_length=length)
    print(f"blocks of {length:3}          {found.nats_per_token:.3f} nats per token")
