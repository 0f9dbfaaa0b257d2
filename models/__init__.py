"""Weights: loading, encoding, denoising, decoding, and the recipe that made the default bundle."""
