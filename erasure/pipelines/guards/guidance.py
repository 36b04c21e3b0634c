"""The form `guidance`: a term of guidance away from a text (SLD, Schramowski et al. 2023, arXiv 2211.05105).

With e_p, e_s and e_0 the predictions for the prompt, the text to keep out and the empty (or negative) prompt, guidance
of scale g becomes e_0 + g (e_p - e_0 - gamma), where (equations 3 to 8 of the paper)

    gamma_t = mu (e_s - e_0) + momentum nu_t
    mu      = min(1, scale |e_p - e_s|) where e_p - e_s < threshold, else 0        (element by element)
    nu_t+1  = decay nu_t + (1 - decay) gamma_t,  nu_0 = 0

and gamma is left out during the warm-up, in which nu is built up all the same. Equation 6 of the paper prints
max(1, .) for the min(1, .) of its code; with max, any scale would at least double the guidance everywhere.

The prediction for the prompt is replaced by e_p - gamma, so that the pipeline's own guidance does the rest: every
sampler serves, and without classifier-free guidance (g = 1) the same formula holds. mu compares noises: predictions of
v or of a velocity are converted for it, while gamma stays in the units of the network. The warm-up is the share of the
noise schedule, 0.2 for 10 of 50 evenly spaced steps, so that it does not depend on the number of steps.

Cost: one more pass of the network for each guard and image in every step; without classifier-free guidance two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasure.config import setting
from erasure.model.architectures import Architecture, architecture_of
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import signal_and_noise
from erasure.pipelines.guards.form import Acting, Drawing, Form, begun, rows_of
from erasure.pipelines.guards.network_text import with_text
from erasure.pipelines.replaced_forward import ReplacedForward, pick, prediction, split, with_prediction


@dataclass(frozen=True)
class Guidance(Form):
    """The settings of guidance away from a text; the names of the paper in brackets.

    Args:
        safety_scale: factor on the distance of prompt and text before it is limited to 1 (s_S).
        threshold: difference of the predicted noises from which on the prompt counts as far from the text (lambda).
        warm_up: share of the noise schedule at its noisy end in which the term does not act (delta).
        momentum: weight of the momentum (s_m).
        momentum_decay: share of the momentum that a step keeps (beta_m).
    """

    NETWORKS: ClassVar[tuple[str, ...]] = ("unet", "sd3", "pixart", "sana")

    safety_scale: float = setting(1000.0, above=0)
    threshold: float = setting(0.01)
    warm_up: float = setting(0.2, at_least=0, below=1)
    momentum: float = setting(0.3, at_least=0)
    momentum_decay: float = setting(0.4, at_least=0, below=1)

    @classmethod
    def unsuited(cls, architecture: Architecture) -> str:
        """Return why there is no guidance to change: FLUX.1 is told its guidance as an input."""
        if architecture.name == "flux":
            return "its guidance is an input of the network and not a difference of two predictions"
        return super().unsuited(architecture)

    @classmethod
    def prepare(cls, drawing: Drawing, guards: Sequence[Acting[Guidance]]) -> Callable[[], SafetyGuidance]:
        """Encode the texts of the guards and the empty one."""
        texts = [drawing.conditions(", ".join(guard.texts)) for guard in guards]
        return partial(SafetyGuidance, drawing, guards, texts, drawing.conditions(""))

    def term(self, prompt: Tensor, concept: Tensor, empty: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        """Return mu (e_s - e_0), the guidance towards the text without momentum.

        Args:
            prompt: e_p [n, c, h, w].
            concept: e_s [n, c, h, w].
            empty: e_0 [n, c, h, w].
            unit: noise per unit of these predictions at their timesteps, one number or [n, 1, 1, 1].
        """
        distance = unit * (prompt - concept)
        limited = (self.safety_scale * distance.abs()).clamp(max=1.0)
        return torch.where(distance < self.threshold, limited, 0.0) * (concept - empty)


class SafetyGuidance(ReplacedForward):
    """A replacement for the network's forward that subtracts the guards' terms from the predictions for the prompts.

    Args:
        drawing: the call.
        guards: the guards that act in it.
        texts: the conditions of each guard's texts, one sample each.
        empty: those of the empty prompt.
    """

    def __init__(
        self, drawing: Drawing, guards: Sequence[Acting[Guidance]], texts: Sequence[Conditions], empty: Conditions
    ) -> None:
        architecture = architecture_of(drawing.pipe)
        shares = torch.stack([guard.shares for guard in guards]).repeat_interleave(drawing.images, 1)
        chosen = shares.ne(0).any(0) | drawing.whole
        self._flow, self._scheduler = architecture.flow, drawing.pipe.scheduler
        self._forms = [guard.form for guard in guards]
        self._shares = [share[chosen].view(-1, 1, 1, 1) for share in shares]
        self._texts, self._empty = texts, empty
        self._chosen = chosen
        self._momenta: list[Tensor | None] = [None] * len(guards)
        self._time_scale = float(getattr(drawing.network.config, "timestep_scale", 1.0))  # SANA is told scaled times
        self._last = float("inf")
        super().__init__(drawing.network, architecture.component)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network for the prompts and for the guards' texts, and return the guided predictions.

        Args:
            args: arguments of the network.
            kwargs: named arguments of the network.

        Raises:
            ErasureError: the batch is not that of the prompts.
        """
        self.calls += 1
        sample, args, kwargs = split(args, kwargs)
        first, guided = rows_of(sample, len(self._chosen))
        # By itself, so that rows on which no guard acts keep every bit.
        plain = self._forward(sample, *args, **kwargs)
        rows = torch.cat([torch.zeros(first, dtype=torch.bool), self._chosen])
        inputs = pick((sample, *args), rows, len(sample)), pick(kwargs, rows, len(sample))
        outputs = prediction(plain)
        channels = min(outputs.shape[1], sample.shape[1])  # a predicted variance follows them in some networks
        named = outputs[rows.to(outputs.device), :channels].float()
        if guided:
            empty = outputs[:first][self._chosen.to(outputs.device), :channels].float()
        else:
            empty = self._predicted(self._empty, inputs, channels)
        time = args[0] if args else kwargs["timestep"]
        times = torch.as_tensor(time).flatten().expand(len(sample)) if torch.as_tensor(time).numel() == 1 else time
        times = times[rows.to(times.device)]
        change = self._terms(
            times if self._time_scale == 1 else times / self._time_scale, named, empty, inputs, channels
        )
        result = outputs.clone()
        result[rows.to(outputs.device), :channels] = (named - change).to(outputs.dtype)
        return with_prediction(plain, result)

    def _terms(self, times: Tensor, named: Tensor, empty: Tensor, inputs: Any, channels: int) -> Tensor:
        """Return the sum of the guards' gamma, each times its strength, and carry the momenta on."""
        if float(times[0]) > self._last:  # another trajectory
            self._momenta = [None] * len(self._forms)
        self._last = float(times[0])
        left = begun(times, self._scheduler, len(times)).view(-1, 1, 1, 1).to(named.device)
        total = torch.zeros_like(named)
        for number, (form, share) in enumerate(zip(self._forms, self._shares, strict=True)):
            concept = self._predicted(self._texts[number], inputs, channels)
            gamma = form.term(named, concept, empty, self._unit(times))
            momentum = self._momenta[number]
            if momentum is not None:
                gamma = gamma + form.momentum * momentum
            else:
                momentum = torch.zeros_like(gamma)
            self._momenta[number] = form.momentum_decay * momentum + (1 - form.momentum_decay) * gamma
            total = total + torch.where(left <= 1 - form.warm_up, share.to(gamma) * gamma, 0.0)
        return total

    def _predicted(self, conditions: Conditions, inputs: Any, channels: int) -> Tensor:
        """Return the prediction for a text in place of the prompts, in fp32."""
        (sample, *args), kwargs = inputs
        args, kwargs = with_text(args, kwargs, conditions.expand(len(sample)))
        return prediction(self._forward(sample, *args, **kwargs))[:, :channels].float()

    def _unit(self, times: Tensor) -> Tensor | float:
        """Return how much predicted noise one unit of the network's prediction is at timesteps [n]."""
        if self._flow:  # noise = x + (1 - sigma) v, and the time is 1000 sigma
            return (1 - begun(times, self._scheduler, times.numel())).float().view(-1, 1, 1, 1).to(times.device)
        kind = getattr(self._scheduler.config, "prediction_type", "epsilon")
        if kind == "epsilon":
            return 1.0
        signal, noise = signal_and_noise(self._scheduler, times.flatten())
        return signal if kind == "v_prediction" else -signal / noise
