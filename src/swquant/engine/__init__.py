"""The block engine: cached hidden states, run state, blocks, and how they move."""
