"""Functional reinforcement learning in JAX: many seeds and settings in one compiled program."""

from jrl.host import use_cpu_cores

__version__ = "0.1.0"

use_cpu_cores()
