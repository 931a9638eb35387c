"""Kinds of grids: a file here that defines an instance of its own name is a kind of that name; so is an entry point."""
