"""One flat parameter vector per network: one all-reduce, one clip and one fused AdamW call a step.

With `muon`, matrices and convolutions inside the network take Muon's steps instead, at the same rate.

The float32 master holds the truth; the network computes with a low-precision working copy, whose tensors are views
of one buffer (convolution weights laid out channels-last), and its gradients accumulate into views of another.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.training.distributed import Ranks
from models.training.muon import Muon

_ALIGN = 64  # elements; keeps every view aligned for vector loads


class FlatOptimizer:
    """AdamW with gradient clipping and an exponential moving average over a network's flattened parameters.

    Args:
        muon: Muon for all weights of two or more dimensions but the first and last convolution's, which see pictures.
    """

    def __init__(
        self,
        network: nn.Module,
        ranks: Ranks,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        decay: float = 0.0,
        average: float,
        muon: bool = False,
    ) -> None:
        self.ranks = ranks
        self.average = average
        self.iterations = 0
        self._parameters = list(network.parameters())
        self._offsets: list[int] = []
        total = 0
        for parameter in self._parameters:
            self._offsets.append(total)
            total += -(-parameter.numel() // _ALIGN) * _ALIGN
        device = ranks.device
        self.master = torch.zeros(total, device=device)
        for view, parameter in zip(self.views(self.master), self._parameters, strict=True):
            view.copy_(parameter.data)
        ranks.from_main(self.master)
        self.ema = self.master.clone()
        self._work = self.master.to(ranks.dtype)
        self._gradient = torch.zeros_like(self._work)
        works, gradients = self.views(self._work), self.views(self._gradient)
        for parameter, work, gradient in zip(self._parameters, works, gradients, strict=True):
            parameter.data = work
            parameter.grad = gradient
        self._flat = nn.Parameter(self.master)
        self._flat.data = self.master
        self._adam = torch.optim.AdamW(
            [self._flat], lr=0.0, betas=betas, weight_decay=decay, eps=1e-8, fused=ranks.cuda or None
        )
        self._muon = Muon(self.master, self._matrices(network), ranks.dtype) if muon else None

    def _matrices(self, network: nn.Module) -> list[tuple[int, int, int]]:
        """Offset, rows and columns of each weight that is Muon's."""
        named = zip(network.named_parameters(), self._offsets, strict=True)
        return [
            (offset, len(parameter), parameter.numel() // len(parameter))
            for (name, parameter), offset in named
            if parameter.dim() >= 2 and not name.startswith(("conv_in.", "conv_out."))
        ]

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`flat` as tensors of the network's shapes, in the order of its parameters."""
        out = []
        for parameter, offset in zip(self._parameters, self._offsets, strict=True):
            piece = flat[offset : offset + parameter.numel()]
            if parameter.dim() == 4:
                o, i, h, w = parameter.shape
                out.append(piece.view(o, h, w, i).permute(0, 3, 1, 2))
            else:
                out.append(piece.view(parameter.shape))
        return out

    @torch.no_grad()
    def step(self, rate: float, clip: float = 1.0) -> torch.Tensor:
        """Average gradients over ranks, clip, update. Returns the gradient's norm; a non-finite step is skipped."""
        gradient = self.ranks.mean(self._gradient).float()
        norm: torch.Tensor = gradient.norm()
        scale = torch.where(norm.isfinite(), (clip / (norm + 1e-6)).clamp(max=1.0), 0.0)
        self._flat.grad = torch.nan_to_num_(gradient.mul_(scale), 0.0, 0.0, 0.0)
        if self._muon is not None:
            self._muon.step(self.master, self._flat.grad, rate)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._work.copy_(self.master)
        self._gradient.zero_()
        self.iterations += 1
        # A short memory at first, so that the average forgets the initialisation.
        self.ema.lerp_(self.master, 1 - min(self.average, (1 + self.iterations) / (10 + self.iterations)))
        return norm

    @torch.no_grad()
    def clear(self) -> None:
        self._gradient.zero_()

    @torch.no_grad()
    def start_from(self, network: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Take `weights`, by the names of `network`'s parameters, as the beginning; those not among them become zero.

        Args:
            network: the one that this optimiser was made for.

        Raises:
            ValueError: `weights` holds what the network does not, or another shape.
        """
        named = dict(zip((name for name, _ in network.named_parameters()), self.views(self.master), strict=True))
        for name, value in weights.items():
            if name not in named or named[name].shape != value.shape:
                raise ValueError(f"weights to start from: '{name}' of shape {tuple(value.shape)} does not fit")
        for name, view in named.items():
            if name in weights:
                view.copy_(weights[name])
            else:
                view.zero_()
        self.ema.copy_(self.master)
        self._work.copy_(self.master)

    @torch.no_grad()
    def copy_to(self, network: nn.Module, flat: torch.Tensor) -> None:
        """Write `flat` (the master, the average, …) into a network of the same shapes, in that network's dtype."""
        torch._foreach_copy_([p.data for p in network.parameters()], self.views(flat))

    def state(self) -> dict[str, Any]:
        state = {"master": self.master, "ema": self.ema, "adam": self._adam.state_dict(), "iterations": self.iterations}
        return state if self._muon is None else state | {"momentum": self._muon.momentum}

    def load(self, state: dict[str, Any]) -> None:
        self.master.copy_(state["master"])
        self.ema.copy_(state["ema"])
        self._work.copy_(self.master)
        self._adam.load_state_dict(state["adam"])
        if self._muon is not None:
            self._muon.momentum.copy_(state["momentum"])
        self.iterations = state["iterations"]
