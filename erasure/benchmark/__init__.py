"""The table of methods and concepts on glyph, and the demonstration."""
