"""A method, a family and a format for swquant from another package."""
