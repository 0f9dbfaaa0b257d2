"""What the prompt rewriter is told, and what it must not lose; shared by its recipe and its service."""
