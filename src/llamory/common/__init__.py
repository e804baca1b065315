"""Helpers without a subject of their own: files, locks, optional packages, progress bars, free memory."""
