"""Folders of photos, classified: ``vs2 classify``, from its request to its table and page."""
