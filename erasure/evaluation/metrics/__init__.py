"""Metrics over judged images, image features and model weights, each with its interval; one file a family."""
