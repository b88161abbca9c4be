"""Whole runs on tiny random models: CPU, no network."""
