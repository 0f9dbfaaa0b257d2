"""The prompt rewriter's recipe, one command:  python -m models.training.rewriter.run --data .data --out out/rewriter

Writes the held-out prompts (heldout.jsonl, as `headstart eval` reads them), the answers to them before and after tuning
(answers.jsonl), the adapter in PEFT's format and figures.json. Started again, it goes on where it was. --miniature does
it all on the CPU in well under a minute, with a random model and eight concepts.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.rewriter.subjects import Vocabulary
from models.rewriter.template import EXAMPLES, SYSTEM
from models.training.concepts import Concept, select
from models.training.prompts import write_records
from models.training.rewriter import adapter
from models.training.rewriter.base import HUB_ID, load_base, tiny_base, unpack_smollm
from models.training.rewriter.facts import figures
from models.training.rewriter.heldout import EACH, held_out, records
from models.training.rewriter.packing import Chat, Rows
from models.training.rewriter.pairs import Pair, PairWriter
from models.training.rewriter.tune import FULL, MINIATURE, Tuning, answer, write_json
from models.training.text import LENGTH, unpack_minilm

_SECONDS, _MINIATURE_SECONDS = 100.0, 8.0
_MINIATURE_CONCEPTS = ("cat", "apple", "umbrella", "fish", "rocket", "tree", "star", "castle")
_MINIATURE_EACH = 1  # prompts of every kind
_SHOWN = 12


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data"), help="the wheels of the language model and MiniLM")
    parser.add_argument("--out", type=Path, default=Path("out/rewriter"))
    parser.add_argument(
        "--seconds", type=float, help=f"of training; {_SECONDS:.0f}, in miniature {_MINIATURE_SECONDS:.0f}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--miniature", action="store_true", help="a tiny random model, for the CPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # rows are written in processes of their own
    began = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f}s] {text}", flush=True)

    if args.miniature:
        torch.set_num_threads(1)  # tiny kernels; more threads mostly wait for each other
    args.out.mkdir(parents=True, exist_ok=True)
    concepts, fits = _material(args)
    writer = PairWriter(concepts, fits)
    pairs = held_out(PairWriter(concepts, fits, unseen=True), _MINIATURE_EACH if args.miniature else EACH)
    write_records(args.out / "heldout.jsonl", records(pairs, concepts))
    model, tokenizer = _base(args, writer)
    log(f"{len(concepts)} concepts, {len(pairs)} held-out prompts; {model.num_parameters() / 1e6:.1f} M parameters")
    _tune(args, model, tokenizer, writer, pairs, log)
    return 0


def _material(args: argparse.Namespace) -> tuple[tuple[Concept, ...], Callable[[str], bool]]:
    """The concepts, and whether the image model reads the whole of a caption."""
    if args.miniature:
        return select(_MINIATURE_CONCEPTS), lambda caption: len(re.findall(r"\w+|[^\w\s]", caption)) <= LENGTH - 2
    tokenizer = Tokenizer.from_file(str(unpack_minilm(args.data) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return select(None), lambda caption: len(tokenizer.encode(caption).ids) <= LENGTH


def _base(args: argparse.Namespace, writer: PairWriter) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    if args.miniature:
        texts = [text for pair in writer.write("words", 500) for text in (pair.prompt, pair.caption)]
        return tiny_base([SYSTEM, *(text for example in EXAMPLES for text in example), *texts])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_base(unpack_smollm(args.data), device)


def _tune(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    writer: PairWriter,
    pairs: Sequence[Pair],
    log: Callable[[str], None],
) -> None:
    """Answers before, training, answers after, and what they are worth."""
    size, chat = MINIATURE if args.miniature else FULL, Chat(tokenizer)
    vocabulary = Vocabulary(writer.concepts)
    prompts = [pair.prompt for pair in pairs]
    tuning = Tuning(model, size, args.out / "progress.pt", args.seed)
    before = _before(args.out / "before.json", tuning, model, lambda: answer(model, tokenizer, chat, prompts))
    log(f"before: {figures(pairs, before, vocabulary)['all']}")
    budget = args.seconds or (_MINIATURE_SECONDS if args.miniature else _SECONDS)
    tuning.run(Rows(writer, chat, size.length, args.seed), budget, log)
    path = adapter.save(tuning.adapters, args.out, HUB_ID)
    after = answer(model, tokenizer, chat, prompts)
    scored = {"before": figures(pairs, before, vocabulary), "after": figures(pairs, after, vocabulary)}
    log(f"after: {scored['after']['all']}")
    rows = [
        {"kind": pair.kind, "prompt": pair.prompt, "caption": pair.caption, "before": first, "after": second}
        for pair, first, second in zip(pairs, before, after, strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (args.out / "answers.jsonl").write_text(text, encoding="utf-8")
    tokens = tuning.step * size.batch * size.length
    write_json(
        args.out / "figures.json",
        {
            "base": HUB_ID,
            "seed": args.seed,
            "size": asdict(size),
            "steps": tuning.step,
            "seconds": tuning.seconds,
            "tokens_per_second": tokens / tuning.seconds,
            "losses": tuning.losses,
            "adapter_bytes": path.stat().st_size,
            "shared_tokens": len(chat.shared),
            **scored,
        },
    )
    for row in rows[:: max(1, len(rows) // _SHOWN)]:
        log(f"{row['prompt']!r} -> {row['after']!r}")


def _before(path: Path, tuning: Tuning, model: LlamaForCausalLM, ask: Callable[[], list[str]]) -> list[str]:
    """The answers of the untuned model, asked for once: a run that goes on has other weights."""
    if tuning.step == 0:
        model.eval()
        write_json(path, {"answers": ask()})
    answers: list[str] = json.loads(path.read_text(encoding="utf-8"))["answers"]
    return answers


if __name__ == "__main__":
    sys.exit(main())
