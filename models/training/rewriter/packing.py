"""Training rows: the shared beginning of all conversations once, then as many prompts and answers as fit.

    tokens    | shared beginning | prompt 1, answer 1 | prompt 2, answer 2 | ... | padding |
    part      | 0 ...            | 1 ...              | 2 ...              | ... | -1      |
    positions | 0 ... P-1        | P ...              | P ...              | ... | P ...   |

A token sees those before it of its own part and the shared beginning, as if its conversation stood alone: the same
sharing as that of the prefix cache which serves the model.

Shapes: B rows; L tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from models.rewriter.template import messages, one_line
from models.training.rewriter.pairs import PairWriter

IGNORED = -100
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
_BATCH = 24  # pairs written at once


class Chat:
    """The conversation of `models.rewriter.template` as tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        whole = tokenizer.apply_chat_template(messages(_MARK), tokenize=False, add_generation_prompt=True)
        before, self._after = whole.split(_MARK)
        self._tokenizer = tokenizer
        self._end: int = tokenizer.eos_token_id
        self.shared = self._ids(before)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def asked(self, prompt: str) -> list[int]:
        """Tokens after the shared beginning up to the answer."""
        return self._ids(one_line(prompt) + self._after)

    def answered(self, caption: str) -> list[int]:
        """Tokens of an answer and its end."""
        return [*self._ids(caption), self._end]


@dataclass(frozen=True, slots=True)
class Row:
    """Each [L]. targets: the token to be said after this one, where it belongs to an answer; else IGNORED."""

    tokens: torch.Tensor
    positions: torch.Tensor
    part: torch.Tensor
    targets: torch.Tensor


class Rows(Dataset[Row]):
    """Row i of pairs that are the same for the same seed, whoever makes it."""

    def __init__(self, writer: PairWriter, chat: Chat, length: int, seed: int) -> None:
        self._writer, self._chat, self._length, self._seed = writer, chat, length, seed

    def __getitem__(self, index: int) -> Row:
        shared = self._chat.shared
        tokens, part, targets = list(shared), [0] * len(shared), [IGNORED] * len(shared)
        positions = list(range(len(shared)))
        for number, (asked, answer) in enumerate(self._conversations(index), start=1):
            size = len(asked) + len(answer)
            if len(tokens) + size > self._length:
                break
            tokens += asked + answer
            part += [number] * size
            targets += [IGNORED] * (len(asked) - 1) + answer + [IGNORED]
            positions += range(len(shared), len(shared) + size)
        rest = self._length - len(tokens)
        return Row(
            tokens=torch.tensor(tokens + [0] * rest),
            positions=torch.tensor(positions + [len(shared)] * rest),
            part=torch.tensor(part + [-1] * rest),
            targets=torch.tensor(targets + [IGNORED] * rest),
        )

    def _conversations(self, index: int) -> Iterator[tuple[list[int], list[int]]]:
        """Prompts and answers without end."""
        batch = 0
        while True:
            for pair in self._writer.write(f"{self._seed} {index} {batch}", _BATCH):
                yield self._chat.asked(pair.prompt), self._chat.answered(pair.caption)
            batch += 1


def collate(rows: list[Row]) -> Row:
    """Rows as one, each field [B, L]."""
    return Row(*(torch.stack([getattr(row, name) for row in rows]) for name in Row.__slots__))


def sees(part: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, L, L]: which tokens (last) each token (second to last) attends to, from parts [B, L]."""
    earlier = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool, device=part.device).tril()
    allowed = earlier & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))
    return allowed[:, None]
