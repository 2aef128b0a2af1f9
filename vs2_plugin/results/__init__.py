"""Results files, per-image results, and their statistics. Knows NumPy, and nothing of models."""
