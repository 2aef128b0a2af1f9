"""The commands: ``vs2`` and ``vs2-train-sae``."""
