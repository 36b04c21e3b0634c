"""The scripts that made the embedded checkpoint and its judges."""
