"""Those who hear of a run: for a stop at a signal, for machines, for TensorBoard and W&B."""
