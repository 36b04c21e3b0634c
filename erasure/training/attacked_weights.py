"""Weights that train in turns with new words, which learn to bring back what the weights have erased."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from erasure.training.adapters import Weights


class AttackedWeights(Weights):
    """Whole weights of modules, and the vectors of words beside them; one of the two trains at a time.

    Args:
        module: the component; all other parameters of it are frozen.
        targets: the modules of it that train, by path.
        words: start of the words' vectors [words, tokens, width]; they are not part of the patch.
        component: the component's name in a patch.
    """

    def __init__(self, module: nn.Module, targets: dict[str, nn.Module], words: Tensor, component: str) -> None:
        super().__init__(module, targets, component)
        self.words = nn.Parameter(words.float().clone())
        self._earlier: dict[str, Tensor] = dict(self._base)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the weights and the words by name, in fp32."""
        return {**self._params, "words": self.words}

    def train(self, words: bool) -> None:
        """Let the words train and freeze the weights, or the other way round."""
        for param in self._params.values():
            param.requires_grad_(not words)
        self.words.requires_grad_(words)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the base's weights again."""
        for key, param in self._params.items():
            param.copy_(self._base[key])

    def mark(self) -> None:
        """Keep the weights as they are now, for `earlier`."""
        self._earlier = {key: param.data.clone() for key, param in self._params.items()}

    @contextmanager
    def earlier(self) -> Iterator[None]:
        """Swap in the weights that were marked last; the base's, if none were."""
        trained = {key: param.data for key, param in self._params.items()}
        for key, param in self._params.items():
            param.data = self._earlier[key].to(param)
        try:
            yield
        finally:
            for key, param in self._params.items():
                param.data = trained[key]

    def marked(self) -> dict[str, Tensor]:
        """Return the weights that were marked last, by name."""
        return dict(self._earlier)

    def restore_marked(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `marked` returned, when a run is resumed."""
        self._earlier = {key: value.to(self._params[key].device) for key, value in tensors.items()}
