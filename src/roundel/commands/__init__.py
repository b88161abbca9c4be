"""What the commands beside `quantize` compute, one file for each: comparisons, measurements, diagnoses."""
