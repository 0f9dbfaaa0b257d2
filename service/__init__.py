"""Requests: everything that knows who asked for what."""
