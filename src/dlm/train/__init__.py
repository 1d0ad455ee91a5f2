"""Data, optimiser and the loop."""
