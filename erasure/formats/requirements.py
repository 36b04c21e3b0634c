"""Requirements of formats on the patches that are exported to them.

Messages are predicates that follow the name of the format: "kohya" + "needs a low-rank patch, ...".
"""

from __future__ import annotations

from erasure.errors import ErasureError
from erasure.patch import LowRank, Patch
from erasure.patch.module_keys import TRANSFORMER


def need_weights(patch: Patch) -> None:
    """Check that a patch changes weights, as every format holds them.

    Raises:
        ErasureError: it is a guard.
    """
    try:
        patch.weights  # noqa: B018
    except ErasureError as fault:
        raise ErasureError(f"{fault}. Nothing was written") from None


def need_low_rank(patch: Patch) -> LowRank:
    """Return the low-rank factors of a patch.

    Args:
        patch: the patch.

    Raises:
        ErasureError: the patch holds differences of whole weights.
    """
    if not isinstance(patch.payload, LowRank):
        raise ErasureError(
            "needs a low-rank patch, but this one holds differences of whole weights; --rank R (rank=R) approximates "
            "them at low rank"
        )
    return patch.payload


def need_unet_names(patch: Patch) -> None:
    """Check that a patch leaves transformers alone, for whose layers the format has no names.

    Args:
        patch: the patch.

    Raises:
        ErasureError: it changes a transformer.
    """
    if TRANSFORMER in patch.components:
        raise ErasureError(
            "has no names for the layers of a transformer: --format peft holds a low-rank patch under the names that "
            "diffusers and ComfyUI read, --format checkpoint the whole pipeline"
        )


def need_only(patch: Patch, component: str) -> None:
    """Check that a patch changes one component and no other.

    Args:
        patch: the patch.
        component: name of the component, such as `unet`.

    Raises:
        ErasureError: it changes another component.
    """
    if patch.components != [component]:
        raise ErasureError(
            f"holds changes of the {component} alone, but this patch changes {', '.join(patch.components)}"
        )
