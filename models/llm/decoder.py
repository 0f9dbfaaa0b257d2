"""A Llama-family decoder over a flattened batch of tokens.

Shapes: T tokens of all sequences, R rows whose logits are wanted, H hidden size, Hq query and Hkv key-value heads of D
dimensions, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from accel.attention.batch import TokenBatch
from accel.kernels.linear import linear, packed
from accel.kernels.rms_norm import add_rms_norm
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
        self.layers = [DecoderLayer(config, dtype, self.device) for _ in range(config.layers)]
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=self.device)
        self.norm = torch.empty(config.hidden_size, dtype=dtype, device=self.device)
        self.head = self.embedding if config.tied_embeddings else torch.empty_like(self.embedding)
        self._table = rope_table(
            config.max_positions, config.head_dim, config.rope_theta, self.device, config.rope_scaling
        )

    def pack(self) -> None:
        """Lay the weights out for speed, once they are set."""
        self.head = packed(self.head)
        for layer in self.layers:
            layer.pack()

    @torch.inference_mode()
    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """Run the batch through all layers.

        Returns:
            [R, V] float32, logits of the rows that batch.last names.
        """
        eps = self.config.norm_eps
        residual = functional.embedding(batch.tokens, self.embedding)  # [T, H]
        update = torch.zeros_like(residual)  # what the block before adds to it
        for index, layer in enumerate(self.layers):
            x = add_rms_norm(update, residual, layer.attention_norm, eps)
            update = layer.attention(index, x, batch, self._table)
            x = add_rms_norm(update, residual, layer.ffn_norm, eps)
            update = layer.ffn(x)
        x = add_rms_norm(update[batch.last], residual[batch.last], self.norm, eps)
        return linear(x, self.head).float()


class DecoderLayer:
    """Weights of one layer. Query, key and value projections are one matrix, and so are gate and up."""

    def __init__(self, config: LlmConfig, dtype: torch.dtype, device: torch.device) -> None:
        def weight(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        hidden, self._dim = config.hidden_size, config.head_dim
        self._heads = [config.heads, config.kv_heads, config.kv_heads]
        self.attention_norm = weight(hidden)
        self.qkv = weight(sum(self._heads) * self._dim, hidden)
        self.out = weight(hidden, config.heads * self._dim)
        self.ffn_norm = weight(hidden)
        self.gate_up = weight(2 * config.ffn_size, hidden)
        self.down = weight(hidden, config.ffn_size)

    def pack(self) -> None:
        self.qkv, self.out = packed(self.qkv), packed(self.out)
        self.gate_up, self.down = packed(self.gate_up), packed(self.down)

    def attention(self, index: int, x: torch.Tensor, batch: TokenBatch, table: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]; `index` is the layer's."""
        qkv = linear(x, self.qkv).view(len(x), -1, self._dim)
        q, k, v = qkv.split(self._heads, dim=1)
        rope(q, k, table, batch.positions)
        return linear(batch.attend(index, q, k, v).view(len(x), -1), self.out)

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        return linear(swiglu(linear(x, self.gate_up)), self.down)
