"""Samplers: draws, windows, batches whose rows join and leave, and the registry that names them all."""
