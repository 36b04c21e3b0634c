"""Metrics over judged images, with their intervals."""
