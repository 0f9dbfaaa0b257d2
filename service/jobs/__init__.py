"""Requests that outlive the connection which brought them. No torch, and no HTTP."""
