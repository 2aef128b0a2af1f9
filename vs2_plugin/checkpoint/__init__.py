"""SAE checkpoints: their contents, the store that holds them, and how the right one is found."""
