"""The steered model, built from a model string, a checkpoint and a vision tower: it classifies and explains images."""
