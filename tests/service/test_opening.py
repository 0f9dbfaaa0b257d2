"""From settings and a model to its cache: the store, the policy and what prompts are compared by."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cache.latent.keys import Header
from cache.latent.policy import Policy
from cache.latent.store_lmdb import LmdbStore
from models.bundles import registry
from models.bundles.manifest import MANIFEST, read_manifest, seal
from models.diffusion.loading import load_model
from models.diffusion.model import DiffusionModel
from models.errors import ModelError
from service.caching import levels_of
from service.config import CacheSettings, ModelSettings, Settings
from service.errors import SetupError
from service.opening import POLICY, open_latents
from service.stores import identity, open_store, snapshots_of
from tests import tiny
from tests.cache.latent.stores import a_header, latents_of
from tests.service.cached import bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("cached") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    return load(folder)


def load(folder: Path) -> DiffusionModel:
    return load_model(str(folder), dtype="float32", device="cpu", cache_dir=folder)


def settings(home: Path, **cache: object) -> Settings:
    return Settings(
        model=ModelSettings(cache_dir=home),
        cache=CacheSettings(**cache),  # type: ignore[arg-type]
    )


def opened(chosen: Settings, model: DiffusionModel) -> Policy | None:
    """The policy of the cache that is opened."""
    found = open_latents(chosen, model)
    if found is None:
        return None
    found[0].close()
    return found[0].cache.policy


def test_a_model_without_a_policy_gets_the_published_thresholds_for_its_solvers(
    model: DiffusionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    policy = opened(settings(tmp_path), model)
    assert policy is not None
    assert policy.source == "NIRVANA"
    assert policy.levels == levels_of(model)
    assert "tiny comes without a policy of its own; the published thresholds are used" in caplog.text
    assert "the policy is silent on lcm: those pictures are drawn from scratch" in caplog.text
    assert [path.name.partition("@")[0] for path in (tmp_path / "latents").iterdir()] == ["tiny"]


def test_the_settings_policy_comes_before_the_models_own(model: DiffusionModel, folder: Path, tmp_path: Path) -> None:
    for path, source in ((folder / POLICY, "its own"), (tmp_path / "given.json", "given")):
        path.parent.mkdir(exist_ok=True)
        Policy({"lcm": ((0.9, 0.5),)}, levels_of(model), source).save(path)
    try:
        own, given = (opened(settings(tmp_path, policy=path), model) for path in (None, tmp_path / "given.json"))
    finally:
        (folder / POLICY).unlink()
    assert own is not None
    assert given is not None
    assert (own.source, given.source) == ("its own", "given")


def test_a_bundle_ships_a_policy_as_a_sealed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = bundle(tmp_path / "root"), tmp_path / "cache"
    (root / "model_index.json").unlink()  # which assembling writes
    about = {"name": "tiny-v1", "version": "1", "description": "", "licence": "none", "sources": {}}
    (root / MANIFEST).write_text(json.dumps(about))
    monkeypatch.setattr(registry, "ROOTS", {"tiny": root})

    def pulled() -> Policy | None:
        seal(root)
        registry.pull("tiny", cache, roots=registry.ROOTS)
        return opened(settings(cache), load_model("tiny", dtype="float32", device="cpu", cache_dir=cache))

    assert getattr(pulled(), "source", None) == "NIRVANA"
    (root / POLICY).parent.mkdir()
    Policy({"lcm": ((0.9, 0.5),)}, {25: 0.5}, "shipped", fresh={"lcm": 0.25}).save(root / POLICY)
    policy = pulled()
    assert POLICY.as_posix() in [file.path for file in read_manifest(root).files]
    assert policy == Policy.load(root / POLICY)
    (root / POLICY).write_text("{}")
    with pytest.raises(ModelError, match=POLICY.as_posix()):
        registry.pull("tiny", cache, roots=registry.ROOTS)


@pytest.mark.parametrize(("text", "told"), [("{}", "'format' is missing"), (None, "No such file or directory")])
def test_a_policy_that_is_none(model: DiffusionModel, tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "policy.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SetupError, match=rf"^cache.policy: {path}: .*{told}"):
        open_latents(settings(tmp_path, policy=path), model)
    assert not (tmp_path / "latents").exists()


def test_models_that_cannot_have_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    wordless = load(tiny.consistency(tmp_path / "wordless"))
    student = load(tiny.lcm(tmp_path / "student"))
    plain = load(tiny.sd(tmp_path / "plain"))
    assert [opened(settings(tmp_path), model) for model in (wordless, student, plain)] == [None] * 3
    assert "no cache: wordless takes no prompts" in caplog.text
    assert "no cache: there is no policy for student, and the published thresholds are not for it" in caplog.text
    assert f"no cache: prompts cannot be compared: bundle 'default' is not in {tmp_path}" in caplog.text


def test_a_folder_that_holds_another_model_now_has_another_identity(folder: Path, tmp_path: Path) -> None:
    first = identity("tiny", "local", folder)
    assert first == identity("tiny", "local", folder)
    assert first.startswith("tiny@")
    copy = tmp_path / "unet" / "model.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(b"1")
    one = identity("tiny", "local", tmp_path)
    copy.write_bytes(b"12")
    two = identity("tiny", "local", tmp_path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    assert len({first, one, two, identity("tiny", "local", tmp_path)}) == 4
    assert identity("owner/name", "abc", tmp_path) == "owner_name@abc"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_how_far_the_entries_are_read(
    model: DiffusionModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path)
    with closing(open_store(chosen, identity("tiny", "local", folder))) as store:
        for i in range(5):
            store.put(a_header(i), latents_of(i))
    headers = LmdbStore.headers

    def slow(self: LmdbStore) -> Iterator[Header]:
        for header in headers(self):
            time.sleep(0.06)
            yield header

    monkeypatch.setattr(LmdbStore, "headers", slow)
    monkeypatch.setattr("cache.latent.lookup._BATCH", 1)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert opened(chosen, model) is not None
    assert re.search(r"cache:  ?[4-8]0%\|.*\| [234]/5 \[00:00<00:00, .*entries/s\]", terminal.getvalue())


def test_large_indexes_are_saved_beside_the_latents_unless_those_are_elsewhere(tmp_path: Path) -> None:
    assert snapshots_of(settings(tmp_path), "m@1") == tmp_path / "latents" / "m@1" / "index"
    assert snapshots_of(settings(tmp_path, redis_url="redis://127.0.0.1"), "m@1") is None


def test_a_url_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"^cache.redis_url: ") as caught:
        open_store(settings(tmp_path, redis_url="redis://:hunter2@localhost:many/0"), "m@1")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
