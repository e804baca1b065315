"""Base models: finding, loading and adapting a checkpoint."""
