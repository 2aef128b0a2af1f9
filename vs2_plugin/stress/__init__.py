"""Stress tests: a model's accuracy if classes are absent, imbalanced or few, or images come in another order."""
