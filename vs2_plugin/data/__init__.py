"""Data sets: what they are called and where they lie, their images, and activations of those trained on."""
