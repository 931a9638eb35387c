"""Output formats: a file here that defines a class of its own name is a format of that name."""
