"""Ways in which a source may be quantized: a file each, which makes the plain model's tensors of those on disk."""
