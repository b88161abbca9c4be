"""Fast twins of the hot loops. Each has a plain torch twin elsewhere that is its specification and its test."""
