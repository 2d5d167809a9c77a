"""The commands. Nothing outside this package imports it."""
