"""Result files, per-image results, and statistics over them. Knows NumPy, and nothing of models."""
