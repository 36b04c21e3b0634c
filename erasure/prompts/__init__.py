"""Prompt sets as CSV files, and the script that writes them."""
