"""Training SAEs for a tower on the images of data sets: from a request to a checkpoint."""
