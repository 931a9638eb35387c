"""Ultra-low-bit quantization of large language models with distribution-aligning losses."""

__version__ = "0.1.0"
