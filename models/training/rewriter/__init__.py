"""The recipe of the prompt rewriter: pairs of a noisy prompt and its clean caption, and a LoRA tuned on them."""
