"""SAE checkpoints: what one holds, where they lie, and how the right one is found."""
