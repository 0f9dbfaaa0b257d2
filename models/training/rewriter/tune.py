"""Tuning: the adapters of a decoder learn to answer noisy prompts with clean captions.

Shapes: B rows; L tokens of a row; H hidden width; R answer tokens of a batch.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.rewriter.template import MAX_TOKENS, caption_of
from models.training.rewriter import adapter
from models.training.rewriter.packing import IGNORED, Chat, Row, Rows, collate, sees

_ENDLESS = 2**31
_WARM_UP = 0.03  # of the time
_CLIP = 1.0
_SAVED_EVERY = 30.0  # seconds
_ANSWERED_AT_ONCE = 100


@dataclass(frozen=True)
class Size:
    """length: tokens of a row. batch: rows of a step. workers: processes that write rows; 0: this one."""

    rank: int
    alpha: float
    length: int
    batch: int
    rate: float
    workers: int
    log_every: int


FULL = Size(rank=24, alpha=48, length=1024, batch=16, rate=1e-3, workers=12, log_every=50)
MINIATURE = Size(rank=8, alpha=16, length=512, batch=4, rate=1e-2, workers=0, log_every=10)


class Tuning:
    """The adapters of one model, how far they have come, and the file that remembers it.

    Steps see the same rows in every run of a seed; how many there are, and so their learning rates, is the clock's
    doing.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        size: Size,
        progress: Path,
        seed: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.adapters = adapter.adapt(model, size.rank, size.alpha)
        self._model, self._size, self._progress, self._now = model, size, progress, now
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=size.rate, weight_decay=0.0, fused=True)
        self._parameters = parameters
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        if progress.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self._progress, map_location=self._model.device, weights_only=True)
        adapter.load(self.adapters, state["adapters"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def _save(self) -> None:
        partial = self._progress.with_suffix(".partial")
        state = {
            "adapters": adapter.weights(self.adapters),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        torch.save(state, partial)
        partial.replace(self._progress)

    def run(self, rows: Rows, budget: float, log: Callable[[str], None]) -> None:
        """Train until `budget` seconds have been spent, those before an interruption counted."""
        device, size = self._model.device, self._size
        first = self.step * size.batch
        loader = DataLoader(
            rows,
            batch_size=size.batch,
            sampler=range(first, _ENDLESS),
            num_workers=size.workers,
            collate_fn=collate,
            multiprocessing_context="fork" if size.workers else None,
        )
        before, saved, recent = self.seconds, self._now(), list[torch.Tensor]()
        began = saved
        self._model.train()
        for batch in loader:
            if self.seconds >= budget:
                break
            rate = size.rate * rate_at(self.seconds / budget)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            recent.append(self._train(batch, device))
            self.step += 1
            if self.step % size.log_every == 0:  # only here does the host wait for the device
                self.losses.append(float(torch.stack(recent).mean()))
                recent.clear()
                log(f"step {self.step}: loss {self.losses[-1]:.4f}, rate {rate:.1e}")
            self.seconds = before + self._now() - began
            if self._now() - saved > _SAVED_EVERY:
                self._save()
                saved = self._now()
        self._model.eval()
        self._save()

    def _train(self, batch: Row, device: torch.device) -> torch.Tensor:
        """One step; returns the loss, on the device."""
        tokens, positions, part, targets = (
            getattr(batch, name).to(device, non_blocking=True) for name in Row.__slots__
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states = self._model.model(
                input_ids=tokens, attention_mask=sees(part), position_ids=positions, use_cache=False
            ).last_hidden_state
            wanted = targets != IGNORED
            logits = self._model.lm_head(states[wanted])  # [R, V]: of the answers alone, a tenth of all
        loss = F.cross_entropy(logits.float(), targets[wanted])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP)
        self._optimizer.step()
        return loss.detach()


def rate_at(progress: float) -> float:
    """Factor of the learning rate: a short rise, then half a cosine to nothing."""
    if progress < _WARM_UP:
        return (progress + 1e-3) / (_WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))))


@torch.inference_mode()
def answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chat: Chat, prompts: Sequence[str]
) -> list[str]:
    """The captions that the model answers with, by the most likely tokens."""
    captions = []
    device, pad = model.device, tokenizer.pad_token_id
    for start in range(0, len(prompts), _ANSWERED_AT_ONCE):
        rows = [chat.shared + chat.asked(prompt) for prompt in prompts[start : start + _ANSWERED_AT_ONCE]]
        width = max(len(row) for row in rows)
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            said = model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=pad,
            )
        captions += [caption_of(text) for text in tokenizer.batch_decode(said[:, width:], skip_special_tokens=True)]
    return captions


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
