"""The benchmark of methods and concepts on glyph (`erasure bench`), and the demonstration (`erasure demo`)."""
