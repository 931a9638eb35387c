"""Phases: the steps from a block's full-precision parameters to its codes."""
