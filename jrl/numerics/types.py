"""Names of what signatures take: each is a tree of arrays, whose structure its maker knows and nobody else needs to."""

from typing import Any

import optax

Params = Any  # Parameters of a network, or of another function that learns: float arrays.
Gradients = Any  # A tree like the parameters.
OptState = optax.OptState  # What an optimizer keeps between two steps.
Memory = Any  # What a network keeps between two steps; () for a feed-forward one.
Observation = Any  # What an environment shows: an array, or a tree of them.
EnvState = Any  # What an environment keeps between two steps.
