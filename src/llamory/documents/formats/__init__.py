"""Document formats: one module per kind of file."""
