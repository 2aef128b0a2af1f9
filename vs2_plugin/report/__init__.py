"""From clip_benchmark's result files to a page, a Markdown table and figures."""
