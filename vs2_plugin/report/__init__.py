"""Turns clip_benchmark's result files into a page, a Markdown table and figures."""
