"""The tables of arXiv 2506.01247, measured: from a file to commands, from their results to a table."""
