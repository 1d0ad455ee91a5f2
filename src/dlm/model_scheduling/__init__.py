"""Which model takes which denoising step (2604.02340): schedules, their cost, the sensitivity of each step, search."""
