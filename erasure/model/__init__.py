"""The checkpoint and its mathematics: loading, modules, conditioning, noise schedules, trajectories."""
