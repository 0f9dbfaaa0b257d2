"""Displaced patch parallelism (Li et al. 2024, DistriFusion): one picture's rows on several ranks."""
