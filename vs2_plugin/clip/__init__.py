"""CLIP models: loading them, identifying their vision towers, reading and editing activations at a site."""
