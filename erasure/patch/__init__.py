"""The patch, the result of an erasure: a change of weights, a guard or features, with a header, in one file."""

from erasure.patch.features import Features
from erasure.patch.fingerprint import fingerprint, same_base
from erasure.patch.guard import Guard
from erasure.patch.header import read_header
from erasure.patch.patch import Patch
from erasure.patch.payload import RUNTIME, Delta, LowRank, Payload

__all__ = [
    "RUNTIME",
    "Delta",
    "Features",
    "Guard",
    "LowRank",
    "Patch",
    "Payload",
    "fingerprint",
    "read_header",
    "same_base",
]
