"""How well a model draws: prompts in, figures out. `headstart eval` and the benchmarks share it."""
