"""Search a model schedule: which denoising steps a smaller model can take, and the price of each choice.

python examples/schedule_search.py [TEXTS] [STEPS]
"""

import sys

import dlm

texts = int(sys.argv[1]) if len(sys.argv) > 1 else 8
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 32
heavy, light = "shakespeare-mask", "shakespeare-mask-2"

# Theory first: the schedule of least path KL that saves 35 % of the FLOPs of the blocks. Then it writes texts, with the same
# seeds as the heavy model (H) alone and the light one (L) alone, and a judge scores them.
report = dlm.schedule.search(heavy, light, way="kl", saved=0.35, steps=steps, samples=texts, max_windows=8)
for row in report.rows:
    bits = row.figures["bits"]
    print(f"{row.label:20} saves {row.saved:4.0%}   path KL {row.path_kl:5.1f} nats   {bits.value:.2f} bits per character")
print(f"best: {report.best} in {report.taken} steps")

# A schedule is an option of every sampler.
model = dlm.load(heavy)
print(model.generate("ROMEO:", length=128, steps=report.taken, schedule=report.best, light=light, temperature=0.7, seed=0))
