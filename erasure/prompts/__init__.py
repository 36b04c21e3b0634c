"""Prompt sets: the CSV files that come with the package, and the code that reads, filters and writes such files."""
