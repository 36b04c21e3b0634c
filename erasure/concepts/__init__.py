"""What is erased: concepts, the words near them and how near. Knows no checkpoint."""
