"""Roundel's checkpoints inside Transformers: the packed linear, and the quantizer that puts it into models."""
