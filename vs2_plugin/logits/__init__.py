"""Methods that read image embeddings as classes: rivals of steering, behind the same hook as anybody's."""
