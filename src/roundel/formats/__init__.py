"""Checkpoint formats: pure functions between `RoundedWeight` and named tensors, and their metadata. No files, no models."""
