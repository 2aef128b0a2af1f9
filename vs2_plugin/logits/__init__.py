"""Methods on logits, which classify image embeddings without steering, registered by the same hook as plugins."""
