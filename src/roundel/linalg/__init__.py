"""Pure tensor mathematics: no modules, no files."""
