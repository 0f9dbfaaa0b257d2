"""Attention of one part's rows, as processors of diffusers' `Attention`.

Self-attention reads the keys and values of the whole picture: this part's fresh, the others' as the link has them.
Cross-attention reads those of the prompts, which are the same at every step and are computed once for a batch of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from accel.patch.exchange import Link


class PatchSelfAttention:
    """Args: whole: the processor that runs while the link is not connected."""

    def __init__(self, link: Link, layer: int, whole: Any) -> None:
        self.link, self._layer, self._whole = link, layer, whole

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[R, l, C], or [R, C, h, w] in a VAE, -> the same, of this part."""
        if self.link.parts == 1:
            whole: torch.Tensor = self._whole(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return whole
        states = hidden_states
        if hidden_states.ndim == 4:
            states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            states = attn.group_norm(states.transpose(1, 2)).transpose(1, 2)
        fresh = torch.cat([attn.to_k(states), attn.to_v(states)], dim=-1)
        every = self.link.swap(self._layer, fresh, own=True).flatten(1, 2)  # [R, L, 2C]
        states = attend(attn, attn.to_q(states), every)
        if hidden_states.ndim == 4:
            states = states.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            states = states + hidden_states
        scaled: torch.Tensor = states / attn.rescale_output_factor
        return scaled


class PatchCrossAttention:
    """Args: index: of this layer's keys and values in the link's `text`; whole: as in PatchSelfAttention."""

    def __init__(self, link: Link, index: int, whole: Any) -> None:
        self.link, self.index, self._whole = link, index, whole

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[R, l, C] -> the same, of this part."""
        if self.link.text is None:
            whole: torch.Tensor = self._whole(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return whole
        states = attend(attn, attn.to_q(hidden_states), self.link.text[self.index])
        scaled: torch.Tensor = states / attn.rescale_output_factor
        return scaled


def attend(attn: Any, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
    """Queries [R, l, C] over keys and values [R, L, 2C], through the layer's output projection."""
    q, k, v = (
        states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in (queries, *keys_values.chunk(2, dim=-1))
    )
    states = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    projected: torch.Tensor = attn.to_out[1](attn.to_out[0](states))
    return projected


def project_text(attn: Any, states: torch.Tensor) -> torch.Tensor:
    """Keys and values of prompts' states [R, L, D] -> [R, L, 2C]."""
    return torch.cat([attn.to_k(states), attn.to_v(states)], dim=-1)
