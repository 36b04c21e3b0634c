"""Checkpoints as people have them: folders, hub ids, single files; what a file is told from its tensors' names."""
