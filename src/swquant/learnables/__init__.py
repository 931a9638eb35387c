"""What a training phase can learn: each a pair of pure functions over explicit state."""
