"""The floating-point types that checkpoints and patches are stored in, by the names users give."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
