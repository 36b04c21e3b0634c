"""Operations on patches: arithmetic, smaller ranks, differences of checkpoints, conflicts, and provenance."""
