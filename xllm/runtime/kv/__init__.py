"""KV cache memory: which request holds which page."""
