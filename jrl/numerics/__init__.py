"""Transforms of functions and of gradients, and what a machine wants."""
