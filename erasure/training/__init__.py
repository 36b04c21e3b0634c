"""What trains: the loop with its checkpoints, the adapters, how to compute, previews and trackers."""
