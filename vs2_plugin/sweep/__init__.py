"""Sweeps: many points of a grid of model strings from one encoding of the test split."""
