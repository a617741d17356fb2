"""The training: its state, and the loop over it."""
