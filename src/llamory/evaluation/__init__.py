"""Evaluation: what a model finds in a long text, as numbers and pictures."""
