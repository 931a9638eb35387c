"""The block engine: streams, journal, blocks, and how they move."""
