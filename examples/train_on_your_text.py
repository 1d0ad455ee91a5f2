"""Train a small masked diffusion model on a text of your own, then sample it.

python examples/train_on_your_text.py [TEXT] [STEPS]
"""

import sys
from pathlib import Path

import dlm

text = sys.argv[1] if len(sys.argv) > 1 else "shakespeare"  # a bundled data set, a .txt file, a folder of them, hf:DATASET
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300
out = Path("runs/mine")

network = dlm.TransformerConfig(vocab_size=1, layers=3, heads=4, width=128, window=128)  # the text decides the vocabulary
config = dlm.TrainConfig(data=text, network=network, context=32, steps=steps, batch=16, eval_every=steps, eval_windows=16)
found = dlm.fit(config, out)  # Ctrl-C saves; resume=True goes on, bitwise identical to a run that never stopped
print(f"validation: at most {found.val_nats:.3f} +- {found.val_stderr:.3f} nats per token after {found.step} steps")

# A run directory is a checkpoint after every save.
print(dlm.load(str(out)).generate(length=128, steps=64, seed=0))
