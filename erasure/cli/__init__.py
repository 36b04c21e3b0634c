"""The command `erasure`."""
