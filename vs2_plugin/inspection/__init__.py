"""What the latents of an SAE stand for, and what they did to an image. Computation only: no files, no data sets."""
