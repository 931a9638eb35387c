"""Several processes that quantize one model together; torch.distributed is used in this package alone."""
