"""Operations on patches: arithmetic, resizing, comparing, conflicts, provenance."""
