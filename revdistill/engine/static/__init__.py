"""A step whose numbers come from device tables: the same operations on the same memory each time, to be replayed."""
