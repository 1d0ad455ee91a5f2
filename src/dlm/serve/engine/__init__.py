"""Continuous batching: one thread, lanes of rows that share forward passes, and the models that are served."""
