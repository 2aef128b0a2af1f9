"""Top-k sparse autoencoders: the module, its training, its files. Knows torch and nothing of CLIP or data sets."""
