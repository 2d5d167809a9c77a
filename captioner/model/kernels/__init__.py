"""Faster forms of parts of the network; none of them changes what it computes but by rounding."""
