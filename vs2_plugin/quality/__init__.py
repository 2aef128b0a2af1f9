"""Measures an SAE as a dictionary: figures of its reconstruction, its latents and its directions, and a page."""
