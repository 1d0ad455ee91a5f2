"""The table of measured samplers behind `--sampler auto`, and its measurement."""
