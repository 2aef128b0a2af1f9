"""Measures the tables of arXiv 2506.01247: turns a file into commands, and their results into a table."""
