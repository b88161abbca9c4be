"""What stages read and write: the original model, factors directories, checkpoints of every format."""
