"""The gradient of a user's loss and its product with a vector: evaluated to the same bits on both ways."""
