"""Speculative decoding that keeps the text: draft tokens come from the text so far, from quantized weights, or from nowhere.

python examples/lossless_draft.py [TOKENS]
"""

import sys
import time

import dlm

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 200
model = dlm.load("shakespeare-ar")

texts = {}
for name, draft in {
    "autoregressive baseline": None,
    "drafted by n-grams of the text": dlm.Draft("ngram", tokens=3),
    "drafted by int4 weights": dlm.Draft("self", "int4", tokens=7),
}.items():
    start = time.perf_counter()
    result = model.generate("ROMEO:", max_new_tokens=tokens, seed=3, draft=draft)
    seconds = time.perf_counter() - start
    texts[name] = result.text
    print(f"{name:30} {tokens / seconds:6.1f} tokens/s   {result.tokens_per_forward:.2f} tokens per forward pass")

# Verification accepts a draft token only where plain decoding draws the same one, so the seed decides the text.
assert len(set(texts.values())) == 1, texts
print(f"\nThe same text from all of them:\n{result.text}")
