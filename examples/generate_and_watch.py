"""Generate a text and watch it settle out of masks.

python examples/generate_and_watch.py [PROMPT] [STEPS]
"""

import sys

import dlm

prompt = sys.argv[1] if len(sys.argv) > 1 else "ROMEO:"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 64

model = dlm.load("shakespeare-mask")

# A frame is the state after one forward pass; what is still masked shows as a block.
for frame in model.stream(prompt, length=200, steps=steps, temperature=0.7, seed=1):
    if sys.stdout.isatty():
        print("\033[2J\033[H", end="")
    settled = frame.settled_BT.float().mean().item()
    print(f"{frame.forwards} forward passes, {settled:.0%} settled\n{model.decode(frame)}\n", flush=True)

# `generate` gives the whole run: the text, its cost and its trajectory, which `dlm show run.traj` replays.
result = model.generate(prompt, length=200, steps=steps, temperature=0.7, seed=1)
print(f"{result.tokens_per_forward:.1f} tokens per forward pass")
result.trajectory.save("run.traj")
