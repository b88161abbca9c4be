"""The embedded demo: a small language model of Python's own standard library and the text to calibrate and judge it on."""
