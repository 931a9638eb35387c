"""The block engine: streams, run state, blocks, and how they move."""
