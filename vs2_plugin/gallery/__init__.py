"""Retrieval: the gallery of unlabelled training images, and the search for a query's neighbours in it by cosine."""
