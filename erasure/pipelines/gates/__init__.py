"""Gates: how strongly a patch acts on one prompt. One file a kind of gate."""
