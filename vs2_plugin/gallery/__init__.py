"""Retrieval: the gallery of unlabeled training images, cosine search in it, and the neighbours of a query."""
