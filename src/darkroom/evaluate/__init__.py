"""How good pictures and reconstructions are, in numbers."""
