"""A search over training options."""
