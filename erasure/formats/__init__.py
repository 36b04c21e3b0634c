"""Files of other programs: importing published patches, and exporting patches so that other programs load them."""

from erasure.formats.import_export import Exported, export_patch, import_patch
from erasure.formats.registry import FORMATS, METHODS
from erasure.formats.support_matrix import exports, matrix, rows
from erasure.patch.loaders import as_it_is

__all__ = ["FORMATS", "METHODS", "Exported", "as_it_is", "export_patch", "exports", "import_patch", "matrix", "rows"]
