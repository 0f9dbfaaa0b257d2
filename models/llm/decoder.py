"""A Llama-family decoder over a flattened batch of tokens.

Shapes: T tokens of all sequences, R rows whose logits are wanted, H hidden size, Hq query and Hkv key-value heads of D
dimensions, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from accel.attention.batch import TokenBatch
from accel.kernels.rms_norm import add_rms_norm, rms_norm
from accel.kernels.rope import rope, rope_table
from accel.kernels.swiglu import swiglu
from models.llm.config import LlmConfig


class Decoder(nn.Module):
    """Touvron et al. 2023, "LLaMA". Knows no cache: `TokenBatch.attend` keeps keys and values and attends to them.

    Args:
        dtype, device: of the weights, which are not set: models.llm.weights fills them.
    """

    def __init__(
        self, config: LlmConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        with self.device:
            self.embedding = _weight(dtype, config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(DecoderLayer(config, dtype) for _ in range(config.layers))
            self.norm = _weight(dtype, config.hidden_size)
            self.head = None if config.tied_embeddings else _weight(dtype, config.vocab_size, config.hidden_size)
        self._table = rope_table(
            config.max_positions, config.head_dim, config.rope_theta, self.device, config.rope_scaling
        )

    @torch.inference_mode()
    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """Run the batch through all layers.

        Returns:
            [R, V] float32, logits of the rows that batch.last names.
        """
        eps = self.config.norm_eps
        residual = functional.embedding(batch.tokens, self.embedding)  # [T, H]
        x = rms_norm(residual, self.layers[0].attention_norm, eps)
        for index, layer in enumerate(self.layers):
            x = layer.attention(index, x, batch, self._table)
            x = add_rms_norm(x, residual, layer.ffn_norm, eps)
            x = layer.ffn(x)
            if index + 1 < len(self.layers):
                x = add_rms_norm(x, residual, self.layers[index + 1].attention_norm, eps)
        x = add_rms_norm(x[batch.last], residual[batch.last], self.norm, eps)
        return functional.linear(x, self.embedding if self.head is None else self.head).float()


class DecoderLayer(nn.Module):
    """Weights of one layer. Query, key and value projections are one matrix, and so are gate and up."""

    def __init__(self, config: LlmConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, self._dim = config.hidden_size, config.head_dim
        self._heads = [config.heads, config.kv_heads, config.kv_heads]
        self.attention_norm = _weight(dtype, hidden)
        self.qkv = _weight(dtype, sum(self._heads) * self._dim, hidden)
        self.out = _weight(dtype, hidden, config.heads * self._dim)
        self.ffn_norm = _weight(dtype, hidden)
        self.gate_up = _weight(dtype, 2 * config.ffn_size, hidden)
        self.down = _weight(dtype, hidden, config.ffn_size)

    def attention(self, index: int, x: torch.Tensor, batch: TokenBatch, table: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        qkv = functional.linear(x, self.qkv).view(len(x), -1, self._dim)
        q, k, v = qkv.split(self._heads, dim=1)
        rope(q, k, table, batch.positions)
        return functional.linear(batch.attend(index, q, k, v).view(len(x), -1), self.out)

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        return functional.linear(swiglu(functional.linear(x, self.gate_up)), self.down)


def _weight(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
