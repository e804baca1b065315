"""Search in memory: which keys each query attends to; one module per method."""
