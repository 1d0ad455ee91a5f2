"""Sampling by denoising: one loop, with rules, cache policies, guidance and constraints to put into it."""
