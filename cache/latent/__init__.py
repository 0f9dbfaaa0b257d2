"""The approximate cache: a prompt starts from the half-denoised latents of a similar one (NIRVANA, arXiv 2312.04429)."""
