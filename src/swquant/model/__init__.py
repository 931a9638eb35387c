"""The model's own code, without its weights: what it is made of, how it is called, where its weights lie on disk."""
