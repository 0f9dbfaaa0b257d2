"""Pages of key-value memory and the prefixes that they hold: reference counts, copy-on-write, a radix tree."""
