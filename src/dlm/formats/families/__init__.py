"""Diffusion checkpoints of other projects, one record a family, loaded into networks of ours. No code of a checkpoint is run."""
