"""Data sets: names, locations and images, and cached activations of the training images."""
