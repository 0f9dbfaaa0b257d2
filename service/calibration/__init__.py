"""How deep into its plan a picture may start from another prompt's latent: measured, and written down as a policy."""
