"""Attention of new tokens over cached keys and values: in pages, and in rows that are contiguous for each sequence."""
