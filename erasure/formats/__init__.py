"""Other people's files: patches of published code read in, and ours written so that other programs read them."""

from erasure.formats.registry import (
    FORMATS,
    METHODS,
    Exported,
    export_patch,
    exports,
    import_patch,
    matrix,
    rows,
)
from erasure.patch.loaders import as_it_is

__all__ = ["FORMATS", "METHODS", "Exported", "as_it_is", "export_patch", "exports", "import_patch", "matrix", "rows"]
