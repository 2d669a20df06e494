"""Fixed-point numbers, and what is done with them to the bit."""
