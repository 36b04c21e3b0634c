"""The patch, the result of an erasure: a change of weights or a guard, with a header, in a safetensors file."""

from erasure.patch.fingerprint import fingerprint, same_base
from erasure.patch.guard import Guard
from erasure.patch.header import read_header
from erasure.patch.patch import Patch
from erasure.patch.payload import Delta, LowRank, Payload

__all__ = ["Delta", "Guard", "LowRank", "Patch", "Payload", "fingerprint", "read_header", "same_base"]
