"""One forward pass of the language model: ours over paged keys and values against transformers, same weights, same run.

A decode step of some sequences, each with a context behind it, and the prefill of one prompt. The two take turns; the
median of each counts. With --threads 1 the time is the processor's, which other processes disturb less.

    python bench/llm_decoder.py [--model default] [--device cpu] [--dtype bfloat16] [--context 400] [--repeats 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from accel.attention.batch import PagedAttend, TokenBatch
from accel.memory.paged_kv import PagedKV
from models.llm.loading import LanguageModel, load_llm, resolve
from service.config import ModelSettings

PAGE = 16


def ours(model: LanguageModel, sequences: int, context: int, new: int) -> Callable[[], torch.Tensor]:
    """A pass over the last `new` tokens of sequences of context + new tokens; returns the last token's logits."""
    config, device = model.config, model.decoder.device
    length = context + new
    pages = -(-length // PAGE)
    kv = PagedKV(config.layers, sequences * pages, PAGE, config.kv_heads, config.head_dim, model.decoder.dtype, device)
    tables = torch.arange(sequences * pages, dtype=torch.int32, device=device).view(sequences, pages)

    def batch(first: int, count: int, decodes: int) -> TokenBatch:
        positions = torch.arange(first, first + count, device=device).repeat(sequences)
        rows = torch.arange(sequences, device=device).repeat_interleave(count)
        slots = tables[rows, positions // PAGE].long() * PAGE + positions % PAGE
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device) * count
        lengths = torch.full((sequences,), first + count, dtype=torch.int32, device=device)
        attend = PagedAttend(kv, tables, slots, starts, lengths, decodes, config.scale)
        last = torch.arange(1, sequences + 1, device=device) * count - 1
        tokens = prompt(sequences, length, device)[:, first : first + count].flatten()
        return TokenBatch(tokens, positions, last, attend)

    if context:
        model.decoder(batch(0, context, 0))
    return lambda: model.decoder(batch(context, new, sequences if new == 1 else 0))


def theirs(model: torch.nn.Module, sequences: int, context: int, new: int) -> Callable[[], torch.Tensor]:
    """The same with transformers, which appends to its cache: what a pass has added is cut off again."""
    cache = DynamicCache(config=model.config)
    tokens = prompt(sequences, context + new, model.device)
    if context:
        model(tokens[:, :context], past_key_values=cache, logits_to_keep=1)

    def run() -> torch.Tensor:
        logits = model(tokens[:, context:], past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        cache.crop(-new)
        return logits

    return run


def prompt(sequences: int, length: int, device: torch.device) -> torch.Tensor:
    """[sequences, length] random tokens, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, 40000, (sequences, length), generator=generator).to(device)


def seconds(run: Callable[[], torch.Tensor], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="bundle, folder, .gguf file or hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=400, help="tokens before a decode step, and of the prefill")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    cache_dir: Path = ModelSettings().cache_dir
    model = load_llm(args.model, dtype=args.dtype, device=args.device, cache_dir=cache_dir)
    device = model.decoder.device
    stock = AutoModelForCausalLM.from_pretrained(resolve(args.model, cache_dir).path, dtype=model.decoder.dtype)
    stock = stock.to(device).eval()
    print(f"{model.card.name}, {args.dtype}, {device}, {torch.get_num_threads()} threads, context {args.context}")
    print("| pass | transformers, tokens/s | ours, tokens/s | ratio | largest difference of logits |")
    print("| --- | --- | --- | --- | --- |")
    for name, sequences, context, new in (
        ("decode, 1 sequence", 1, args.context, 1),
        ("decode, 8 sequences", 8, args.context, 1),
        ("prefill", 1, 0, args.context),
    ):
        runs = theirs(stock, sequences, context, new), ours(model, sequences, context, new)
        gap = (runs[0]() - runs[1]()).abs().max().item()
        rounds = [[seconds(run, device, clock) for run in runs] for _ in range(args.repeats)]
        slow, fast = (sequences * new / statistics.median(times) for times in zip(*rounds, strict=True))
        print(f"| {name} | {slow:.1f} | {fast:.1f} | {fast / slow:.2f} | {gap:.2g} |", flush=True)


if __name__ == "__main__":
    main()
