"""Prolonged reinforcement learning with verifiable rewards (ProRL) in JAX.

Importing the package loads none of its modules; `prolong_jax.train` is the entry point.
"""

__version__ = "0.1.0"
