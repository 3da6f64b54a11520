"""A running average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's parameters, short-sighted at first.

    Attributes:
        values: the averaged parameters, by name.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._decay = decay
        self._steps = 0
        self.values: dict[str, Tensor] = {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the module's present weights into the average."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        now = [p.detach() for p in self._module.parameters()]
        torch._foreach_lerp_(list(self.values.values()), now, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Sets a module's weights to the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])
