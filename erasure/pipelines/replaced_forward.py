"""A network's forward, replaced for the duration of one call of the pipeline."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

SHARED = ("img_ids", "txt_ids")  # arguments of FLUX that all rows share: one entry for each token


class ReplacedForward:
    """A callable that takes the place of a network's forward until `remove`; subclasses define `__call__`.

    Args:
        network: the network.
        component: the name of the component that it is, such as `unet`.
    """

    def __init__(self, network: nn.Module, component: str) -> None:
        self.component = component
        self.calls = 0
        self._network = network
        self._forward = network.forward
        self._had_own_forward = "forward" in vars(network)
        network.forward = self  # type: ignore[assignment]

    def remove(self) -> None:
        """Restore the network's own forward, unless an offloading hook has already done so."""
        # diffusers removes and adds offloading hooks at the end of a call; a forward that they have set must stay.
        if vars(self._network).get("forward") is self:
            if self._had_own_forward:
                self._network.forward = self._forward
            else:
                del self._network.forward


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the latents in a call of a network, its other positional arguments and its other named ones."""
    if args:
        return args[0], args[1:], kwargs
    name = "sample" if "sample" in kwargs else "hidden_states"
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def prediction(output: Any) -> Tensor:
    """Return the prediction in the output of a network, which is a tuple or an object with `sample`."""
    return output[0] if isinstance(output, tuple) else output.sample


def with_prediction(output: Any, value: Tensor) -> Any:
    """Return the output of a network with another prediction in it."""
    if isinstance(output, tuple):
        return (value, *output[1:])
    output.sample = value
    return output


def pick(value: Any, rows: Tensor, n: int) -> Any:
    """Select rows from every tensor with n rows in nested arguments; return everything else, and SHARED, unchanged.

    Args:
        value: a tensor, a list, tuple or dict of values, or anything else.
        rows: boolean mask of the rows to keep [n].
        n: number of rows of the batch.
    """
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.dim() and value.shape[0] == n else value
    if isinstance(value, dict):
        return {key: item if key in SHARED else pick(item, rows, n) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(pick(item, rows, n) for item in value)
    return value
