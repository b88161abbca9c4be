"""Damaged and hostile files: every reader answers with a right result or a `RoundelError`."""
