"""A training step as a list of moves, a file per optimizer."""
