"""The patch, the result of an erasure: low-rank factors or weight differences, with a header, in a safetensors file."""

from erasure.patch.fingerprint import fingerprint, same_base
from erasure.patch.header import read_header
from erasure.patch.patch import Patch
from erasure.patch.payload import Delta, LowRank

__all__ = ["Delta", "LowRank", "Patch", "fingerprint", "read_header", "same_base"]
