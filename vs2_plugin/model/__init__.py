"""The steered model: put together from a model string, a checkpoint and a tower; it classifies and explains."""
