"""The command line: options, help, and what is printed.

What these modules import at their top is imported before any help is shown; what computes is imported inside the commands.
"""
