"""CLIP models: loading them, telling one tower from another, reading and editing activations at a site."""
