"""Instruction tuning through memory: data, batches, and the run."""
