"""Model files: reading, writing, and translating them."""
