"""Grids for swquant from another package."""
