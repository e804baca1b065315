"""Documents into memory: the loop that encodes a text window by window, and the files it writes."""
