"""A server of pictures that are one colour and of texts by a tiny random model, on a real port."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from models.llm.loading import LanguageModel, load_llm
from service.bridge import Bridge
from service.config import LlmSettings, ServerSettings, Settings
from service.llm.assembly import Assembly
from service.metrics import Metrics
from service.rewriting import Rewriting
from service.runtime import Runtime
from service.writer import Writer, open_writer
from tests.models.llm import small
from tests.service.serving import CARD, FakeEngine, Running, listening

CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
KEYS = (("ada", "key-of-ada"), ("bob", "key-of-bob"))


def tiny_writer(folder: Path, **changes: Any) -> LanguageModel:
    """A random model with a chat template that reads 128 tokens; loaded in float32."""
    return load_llm(str(small.llama(folder / "tiny", **changes)), dtype="float32", device="cpu", cache_dir=folder)


@dataclasses.dataclass
class Writing(Running):
    """A server, with what writes its texts."""

    writer: Writer

    @property
    def assembly(self) -> Assembly:
        return self.writer._assembly


@contextlib.contextmanager
def writing(
    model: LanguageModel,
    llm: LlmSettings = LlmSettings(max_running=4),  # noqa: B008 - frozen
    *,
    tenants: bool = False,
    fits: Callable[[str], bool] = lambda caption: True,
    **server: Any,
) -> Iterator[Writing]:
    settings = Settings(server=ServerSettings(api_keys=KEYS if tenants else (), **server), llm=llm)
    engine = FakeEngine()
    writer = open_writer(model, llm)

    def opener(given: Settings, metrics: Metrics) -> Runtime:
        bridge = Bridge(engine, given.engine)
        rewriting = Rewriting(writer, fits, llm.rewrite_budget_s)
        runtime = Runtime(CARD, bridge, given.engine, writer=writer, rewriting=rewriting)
        runtime.start()
        return runtime

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with listening(settings, opener) as (url, server_):
            yield Writing(url, int(url.rpartition(":")[2]), engine, server_.service, server_, writer)
    finally:
        torch.set_num_threads(threads)
