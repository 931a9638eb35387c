"""Quantization arithmetic: pure functions on tensors, used by training and by commitment alike."""
