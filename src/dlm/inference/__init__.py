"""Techniques that make a network fast or exact at inference, each in a file by its textbook name."""
