"""Checkpoint formats: pure functions between `RoundedWeight` and named tensors, and their metadata. No models, and no files but that of
`imatrix`, which the gguf package writes."""
