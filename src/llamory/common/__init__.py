"""Helpers without a subject of their own: files, locks, progress bars, free memory."""
