"""Which model takes which denoising step (2604.02340): schedules, what they cost, how much each step needs the larger model, search."""
