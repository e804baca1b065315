"""Focused Transformer training: batches, crossbatch schedule, and the run."""
