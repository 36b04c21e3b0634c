"""Concepts to erase, and the words that are close to them. Nothing here depends on a particular checkpoint."""
