"""Erase a list of names by one solve, forecast it, and store what the text encoder said of it."""
