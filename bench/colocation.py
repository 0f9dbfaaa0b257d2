"""Pictures and rewrites on one device: each alone, both in one process as `headstart serve` runs them, both in two.

    python bench/colocation.py [--device cuda --dtype bfloat16] [--seconds 20] [--rate 20] [--spec sd15]

Pictures are drawn `--at-once` at a time by a UNet of plain torch layers with random weights: of SD1.5's widths at
512x512 on a GPU, small on a CPU (`--spec` takes one of models/specs.py instead, which needs diffusers). Texts are what
the rewriter asks of its model, of SmolLM2-135M's sizes with random weights (small on a CPU): 280 tokens that all share,
16 of the user's, 14 of the answer. They come at `--rate` a second, Poisson, or as fast as 16 clients get them answered
("flat out"). Each engine has its thread and its bridge; in one process the texts go to a stream of high priority.
Pictures are counted by their steps. The second process runs the same texts, with nothing shared but the device.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from drawing import BareModel
from timing import print_table
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from torch.nn import functional

from models.diffusion.dtype import resolve_device, resolve_dtype
from models.diffusion.model import DiffusionModel, SamplerDefaults
from models.llm.config import LlmConfig
from models.llm.decoder import Decoder
from models.llm.loading import LanguageModel, LlmCard
from models.llm.tokenizer import Tokenizer
from service.bridge import Bridge
from service.config import EngineSettings, LlmSettings
from service.diffusion.engine import DiffusionEngine, NullObserver
from service.diffusion.request import ImageRequest
from service.events import Completed, Failed
from service.llm.request import Delta, LlmRequest, SamplingParams
from service.writer import Writer, open_writer

SHARED, OWN, ANSWER = 280, 16, 14  # tokens of a rewrite
CLIENTS = 16  # of texts, flat out
STEPS = 20  # of a picture
WARM_UP_S = 3.0
KV_PAGES = 2048


@dataclass(frozen=True)
class Scale:
    """Sizes on one kind of device."""

    widths: tuple[int, ...]  # of the UNet, by level
    side: int  # of latents
    llm: LlmConfig


def llm_config(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> LlmConfig:
    return LlmConfig(
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        ffn_size=ffn,
        vocab_size=vocab,
        max_positions=2048,
        norm_eps=1e-5,
        rope_theta=100000.0,
        rope_scaling=None,
        tied_embeddings=True,
    )


SCALES = {
    "cuda": Scale((320, 640, 1280), 64, llm_config(30, 576, 9, 3, 1536, 49152)),  # SD1.5's widths; SmolLM2-135M
    "cpu": Scale((32, 64), 16, llm_config(4, 192, 3, 1, 512, 4096)),
}


class Block(nn.Module):
    """A residual block, and attention over all places."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm, self.first = nn.GroupNorm(8, into), nn.Conv2d(into, out, 3, padding=1)
        self.again, self.second = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(into, out, 1)
        self.qkv, self.out = nn.Linear(out, 3 * out), nn.Linear(out, out)

    def forward(self, x: torch.Tensor, attends: bool) -> torch.Tensor:
        inner = self.first(functional.silu(self.norm(x)))
        x = self.skip(x) + self.second(functional.silu(self.again(inner)))
        if not attends:
            return x
        batch, width, height, _ = x.shape
        q, k, v = self.qkv(x.flatten(2).mT).view(batch, -1, 3, width // 32, 32).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).mT.reshape(batch, -1, height, height)
        return x + self.out(attended.flatten(2).mT).mT.unflatten(2, (height, height))


class PlainUNet(nn.Module):
    """Of torch's layers alone: what a UNet costs, not what it draws."""

    def __init__(self, widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.config = SimpleNamespace(time_cond_proj_dim=None, addition_embed_type=None)
        self.enter = nn.Conv2d(4, widths[0], 3, padding=1)
        pairs = list(zip([widths[0], *widths], widths, strict=False))
        self.down = nn.ModuleList(Block(into, out) for into, out in pairs)
        self.up = nn.ModuleList(Block(2 * out, into) for into, out in reversed(pairs))
        self.leave = nn.Conv2d(widths[0], 4, 3, padding=1)
        self.to(device, dtype).to(memory_format=torch.channels_last)

    def forward(self, sample: torch.Tensor, *ignored: object, **also_ignored: object) -> tuple[torch.Tensor]:
        x, kept = self.enter(sample.to(self.dtype)), []
        for level, block in enumerate(self.down):
            x = block(x, level > 0)
            kept.append(x)
            x = functional.avg_pool2d(x, 2)
        for level, block in reversed(list(enumerate(self.up[::-1]))):
            x = block(torch.cat([functional.interpolate(x, scale_factor=2), kept.pop()], 1), level > 0)
        return (self.leave(x),)


def random_llm(config: LlmConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Of a config's sizes, with a tokenizer of bytes."""
    decoder = Decoder(config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for owner in (decoder, *decoder.layers):
        for name, weight in vars(owner).items():
            if isinstance(weight, torch.Tensor) and weight.dtype == dtype and name != "_table":
                weight.normal_(std=0.02, generator=generator) if weight.ndim > 1 else weight.fill_(1.0)
    decoder.pack()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.decoder = decoders.ByteLevel()
    return LanguageModel(decoder, Tokenizer(backend), config, LlmCard("random", "", "", config.max_positions, False))


class Steps(NullObserver):
    """Counts steps of pictures."""

    def __init__(self) -> None:
        self.count = 0

    def tick(self, pictures: int, evaluations: int, seconds: float) -> None:
        self.count += pictures


@dataclass
class Texts:
    """What became of texts while it was measured."""

    seconds: float = 0.0
    done: int = 0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)

    @property
    def row(self) -> list[str]:
        if not self.latencies:
            return ["", "", "", ""]
        p50, p99 = np.percentile(self.latencies, (50, 99)) * 1e3
        return [f"{self.done / self.seconds:.1f}", f"{self.tokens / self.seconds:.0f}", f"{p50:.0f}", f"{p99:.0f}"]


class Window:
    """Between its opening and its close things count."""

    def __init__(self) -> None:
        self.open = False
        self.ended = False


def load_images(options: argparse.Namespace) -> DiffusionModel:
    device = resolve_device(options.device)
    if options.spec:
        from models.specs import random_model

        return random_model(options.spec, options.dtype, options.device)
    scale = SCALES[device.type]
    network = PlainUNet(scale.widths, resolve_dtype(options.dtype, device), device)
    samplers = {"ddim": SamplerDefaults(STEPS, 1.0, "trailing")}
    model: DiffusionModel = BareModel(network, scale.side, samplers, guided=False)
    return model


def load_texts(options: argparse.Namespace) -> Writer:
    device = resolve_device(options.device)
    model = random_llm(SCALES[device.type].llm, resolve_dtype(options.dtype, device), device)
    return open_writer(model, LlmSettings(kv_pages=KV_PAGES, max_running=64))


async def draw(bridge: Bridge[ImageRequest], model: DiffusionModel, number: int, window: Window) -> None:
    """One client that asks for a picture after the other."""
    card, count = model.card, 0
    while not window.ended:
        count += 1
        request = ImageRequest(
            id=f"{number}-{count}",
            prompt="",
            negative_prompt="",
            n=1,
            width=card.default_size[0],
            height=card.default_size[1],
            steps=STEPS,
            guidance_scale=1.0,
            sampler="ddim",
            eta=0.0,
            seed=count,
        )
        async for event in bridge.submit(request):
            if isinstance(event, Failed):
                raise event.error


async def ask(writer: Writer, number: int, window: Window, texts: Texts) -> None:
    """One rewrite."""
    rng = random.Random(number)
    size = SCALES[writer.device.type].llm.vocab_size
    shared = random.Random(-1)
    tokens = [shared.randrange(size) for _ in range(SHARED)] + [rng.randrange(size) for _ in range(OWN)]
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    begun = time.perf_counter()
    async for event in writer.bridge.submit(LlmRequest(id=str(number), tokens=tuple(tokens), params=params)):
        if isinstance(event, Failed):
            raise event.error
        if window.open and isinstance(event, Delta):
            texts.tokens += len(event.tokens)
        if window.open and isinstance(event, Completed):
            texts.done += 1
            texts.latencies.append(time.perf_counter() - begun)


async def rewrite(writer: Writer, rate: float | None, window: Window, texts: Texts) -> None:
    """Rewrites at a rate, or as fast as CLIENTS get them answered."""
    numbers = iter(range(1 << 30))
    if rate is None:

        async def client() -> None:
            while not window.ended:
                await ask(writer, next(numbers), window, texts)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return
    rng = random.Random(0)
    async with asyncio.TaskGroup() as group:
        due = time.perf_counter()
        while not window.ended:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(ask(writer, next(numbers), window, texts))


async def measured(seconds: float, window: Window, work: Sequence[Coroutine[Any, Any, None]], steps: Steps) -> int:
    """Run the work, and open the window for so many seconds after it has warmed up; the steps run in it."""
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)
        await asyncio.sleep(WARM_UP_S)
        window.open, begun = True, steps.count
        await asyncio.sleep(seconds)
        window.open, window.ended = False, True
        return steps.count - begun


def run(
    options: argparse.Namespace, images: tuple[DiffusionModel, int] | None, writer: Writer | None, rate: float | None
) -> tuple[float, Texts]:
    """Pictures a second, and what became of the texts."""
    window, texts, steps = Window(), Texts(seconds=options.seconds), Steps()

    async def both() -> int:
        async with contextlib.AsyncExitStack() as stack:
            work: list[Coroutine[Any, Any, None]] = []
            if images is not None:
                model, at_once = images
                settings = EngineSettings(max_batch=at_once, max_running=2 * at_once)
                bridge: Bridge[ImageRequest] = Bridge(DiffusionEngine(model, settings, steps), settings)
                bridge.start()
                stack.push_async_callback(bridge.close, 0.0)
                work += [draw(bridge, model, number, window) for number in range(at_once)]
            if writer is not None:
                work.append(rewrite(writer, rate, window, texts))
            return await measured(options.seconds, window, work, steps)

    return asyncio.run(both()) / STEPS / options.seconds, texts


def texts_alone(options: argparse.Namespace, rate: float | None, ready: Any, begin: Any, results: Any) -> None:
    """The second process: load, wait, run, tell."""
    torch.set_num_threads(options.threads)
    writer = load_texts(options)
    writer.bridge.start()
    run(argparse.Namespace(**vars(options) | {"seconds": 1.0}), None, writer, None)  # what is made on first use
    ready.set()
    begin.wait()
    results.put(run(options, None, writer, rate)[1])


def two_processes(options: argparse.Namespace, model: DiffusionModel, rate: float | None) -> tuple[float, Texts]:
    context = multiprocessing.get_context("spawn")
    ready, begin, results = context.Event(), context.Event(), context.Queue()
    other = context.Process(target=texts_alone, args=(options, rate, ready, begin, results))
    other.start()
    while not ready.wait(1.0):
        if not other.is_alive():
            raise SystemExit("the second process died")
    begin.set()
    rate_of_images, _ = run(options, (model, options.at_once), None, None)
    texts = results.get(timeout=120)
    other.join()
    return rate_of_images, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, help="of each measurement; 20 on a GPU, 4 on a CPU")
    parser.add_argument("--at-once", type=int, help="pictures; 8 on a GPU, 4 on a CPU")
    parser.add_argument("--rate", type=float, help="rewrites a second; 20 on a GPU, 5 on a CPU")
    parser.add_argument("--spec", help="an image model of models/specs.py, in place of the plain one")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU, for each engine")
    options = parser.parse_args()
    gpu = resolve_device(options.device).type == "cuda"
    for name, value in (
        ("seconds", 20.0 if gpu else 4.0),
        ("at_once", 8 if gpu else 4),
        ("rate", 20.0 if gpu else 5.0),
    ):
        if getattr(options, name) is None:
            setattr(options, name, value)
    torch.set_num_threads(options.threads)
    model, writer = load_images(options), load_texts(options)
    writer.bridge.start()
    images, paced = (model, options.at_once), f"{options.rate:g}/s offered"
    where = torch.cuda.get_device_name() if gpu else f"CPU, {options.threads} thread(s) each"
    print(f"{where}, torch {torch.__version__}, {options.dtype}, {model.card.name} {model.card.default_size[0]}px")
    run(argparse.Namespace(**vars(options) | {"seconds": 1.0}), images, writer, None)  # what is made on first use
    alone, _ = run(options, images, None, None)
    rows = [["pictures alone", "", f"{alone:.2f}", "100%", "", "", "", ""]]

    def add(name: str, load: str, found: tuple[float, Texts]) -> None:
        rate, texts = found
        pictures = [f"{rate:.2f}", f"{rate / alone:.0%}"] if rate else ["", ""]
        rows.append([name, load, *pictures, *texts.row])

    for load, rate in ((paced, options.rate), ("flat out", None)):
        add("texts alone", load, run(options, None, writer, rate))
    for load, rate in ((paced, options.rate), ("flat out", None)):
        add("both, one process", load, run(options, images, writer, rate))
    asyncio.run(writer.close(0.0))
    for load, rate in ((paced, options.rate), ("flat out", None)):
        add("both, two processes", load, two_processes(options, model, rate))
    header = ("", "texts", "pictures/s", "of alone", "rewrites/s", "tokens/s", "ms p50", "ms p99")
    print_table(header, rows)


if __name__ == "__main__":
    main()
