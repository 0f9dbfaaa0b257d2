"""The approximate cache: half-denoised latents, found by the similarity of prompts."""
