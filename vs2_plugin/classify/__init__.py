"""Classifies folders of photos (``vs2 classify``), from the request to the table and the page."""
