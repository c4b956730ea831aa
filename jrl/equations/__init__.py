"""Equations, one a function: no networks, no environments, no state."""
