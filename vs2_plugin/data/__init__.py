"""Training images and their activations. Labels and test images are never read here."""
