"""What becomes of a model's accuracy where classes are absent, imbalanced or few, or images come in another order."""
