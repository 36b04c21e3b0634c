"""What is erased: concepts, the words near them, and their similarity. Nothing here knows a checkpoint."""
