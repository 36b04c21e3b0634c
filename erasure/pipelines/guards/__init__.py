"""Guards: changes while drawing that are made of texts and settings and change no weight; one file per form.

`guidance`: guidance away from a text (see guidance.py). `values`: a text is taken out of the values of cross-attention
(see values.py). `tokens`: tokens that name a text are projected away from it (see tokens.py).
"""

from __future__ import annotations

from erasure.pipelines.guards.form import Acting, Attached, Drawing, Form, check_network, make_form
from erasure.pipelines.guards.guidance import Guidance
from erasure.pipelines.guards.tokens import Tokens
from erasure.pipelines.guards.values import Values

__all__ = ["FORMS", "Acting", "Attached", "Drawing", "Form", "check_network", "make_form"]

# The forms by name, in the order in which they are attached: each calls those before it.
FORMS: dict[str, type[Form]] = {"values": Values, "guidance": Guidance, "tokens": Tokens}
