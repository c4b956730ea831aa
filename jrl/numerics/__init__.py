"""Transforms of functions and of gradients, and machine-specific helpers."""
