"""Sprites: a pack from a small package of icons written here, its layout, and the shapes for runs in miniature."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.training.concepts import STYLES, Concept, select
from models.training.sprites import PACKAGES, SIZE, draw_shapes, load_pack, make_pack

ICONS = {
    "wide": {"body": '<rect x="4" y="8" width="24" height="6" fill="#f00"/>'},
    "dot": {"body": '<circle cx="20" cy="10" r="8" fill="#00f" opacity="0.5"/>', "width": 64},
}
ALIASES = {
    "again": {"parent": "plain"},
    "plain": {"parent": "wide"},
    "mirrored": {"parent": "wide", "hFlip": True},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with one small package for each style."""
    table = json.dumps({"icons": ICONS, "aliases": ALIASES, "width": 32, "height": 32}).encode()
    for name, version in PACKAGES.values():
        with tarfile.open(tmp_path / f"iconify-json-{name}-{version}.tgz", "w:gz") as tar:
            member = tarfile.TarInfo("package/icons.json")
            member.size = len(table)
            tar.addfile(member, io.BytesIO(table))
    return tmp_path


def concept(name: str, *drawings: tuple[str, ...]) -> Concept:
    return Concept(name, name + "s", (), (), (), tintable=True, flips=True, drawings=drawings)


BAR = concept("bar", ("wide", "dot"), ("wide",), ("again",), ())
DOT = concept("dot", (), ("dot",), ("dot",), ("dot",))


def test_a_pack_holds_every_drawing_trimmed_and_centred(data: Path) -> None:
    pack = load_pack(make_pack(data, (BAR, DOT)), (BAR, DOT))
    assert pack.counts.tolist() == [[2, 1, 1, 0], [0, 1, 1, 1]]
    assert pack.rows.tolist() == [[[0, 1], [2, 2], [3, 3], [0, 0]], [[0, 0], [4, 4], [5, 5], [6, 6]]]
    assert pack.pixels.shape == (7, SIZE, SIZE, 4)
    assert pack.pixels.dtype == torch.uint8
    for row, (width, height) in {2: (1.0, 0.25), 3: (1.0, 0.25), 4: (1.0, 1.0)}.items():
        shown = pack.pixels[row, ..., 3] > 64
        for axis, share in ((0, width), (1, height)):
            at = shown.any(axis).nonzero().flatten()
            assert len(at) == pytest.approx(share * SIZE / 1.04, abs=0.1 * SIZE)
            assert float(at.float().mean()) == pytest.approx((SIZE - 1) / 2, abs=0.06 * SIZE)
    middle = pack.pixels[:, SIZE // 2, SIZE // 2].int()
    assert (middle[2] - torch.tensor([255, 0, 0, 255])).abs().max() <= 2
    assert (middle[4] - torch.tensor([0, 0, 255, 128])).abs().max() <= 4


def test_rendered_sprites_are_kept(data: Path) -> None:
    path = make_pack(data, (BAR,))
    before = {file: file.stat().st_mtime_ns for file in (data / "sprites").rglob("*.webp")}
    assert len(before) == 4
    assert len(load_pack(make_pack(data, (BAR, DOT)), (BAR, DOT)).pixels) == 7
    assert {file: file.stat().st_mtime_ns for file in before} == before
    written = path.stat().st_mtime_ns
    make_pack(data, (BAR, DOT))
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("icon", ["nothing", "mirrored"])
def test_an_icon_that_is_not_there(data: Path, icon: str) -> None:
    with pytest.raises(KeyError, match=rf"bar: noto-{PACKAGES['noto'][1]} \(noto\) has no icon {icon}"):
        make_pack(data, (replace(BAR, drawings=(("wide",), ("wide",), (icon,), ())),))
    assert not (data / "sprites.zip").exists()


def test_a_package_without_its_table(data: Path) -> None:
    name, version = PACKAGES["3d"]
    with tarfile.open(data / f"iconify-json-{name}-{version}.tgz", "w:gz") as tar:
        folder = tarfile.TarInfo("package/icons.json")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.raises(ValueError, match="is not a file"):
        make_pack(data, (BAR,))


def test_shapes_differ_by_concept_style_and_drawing() -> None:
    concepts = select(("cat", "heart", "cook", "phoenix", "clock", "treasure chest"))
    pack = draw_shapes(concepts, 48)
    assert pack.pixels.shape == (len(pack.pixels), 48, 48, 4)
    assert pack.counts.tolist() == [[min(len(own), 2) for own in c.drawings] for c in concepts]
    assert {0, 2} <= set(pack.counts.flatten().tolist())
    assert len(pack.pixels.flatten(1).unique(dim=0)) == len(pack.pixels)
    used = torch.cat([pack.rows[n, s][: pack.counts[n, s]] for n in range(len(concepts)) for s in range(len(STYLES))])
    assert used.tolist() == list(range(len(pack.pixels)))
