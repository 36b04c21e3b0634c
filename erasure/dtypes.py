"""The floating-point types of checkpoints and patches, by the names that users give: fp32, fp16 and bf16."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
