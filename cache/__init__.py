"""Keys: what may be reused for whom. Imports no torch."""
