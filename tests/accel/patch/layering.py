"""What four ranks do for test_layers.py: they run single layers on their parts of known inputs.

Each returns its outputs by name; the parent knows the inputs too, and computes what they should be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from accel.patch.attention import PatchSelfAttention
from accel.patch.conv import PatchConv2d, PatchInputConv2d
from accel.patch.exchange import Exchange, Link
from accel.patch.mesh import Mesh, make_mesh
from accel.patch.norm import PatchGroupNorm

CPU = torch.device("cpu")
PARTS = 4
GROUPS = 4
STATISTICS = {"displaced": "corrected", "stale_gn": "stale", "separate_gn": "separate", "sync_gn": "synchronous"}
CONVS = {  # kernel, stride, padding
    "stride 1": (3, 1, 1),
    "stride 2": (3, 2, 1),
    "kernel 5": (5, 1, 2),
    "above only": (2, 1, 1),
}


def pictures(step: int, slot: int) -> torch.Tensor:
    """[8, 16, 6], the layer's input at a step of the picture in a slot; statistics differ between parts and steps."""
    generator = torch.Generator().manual_seed(100 * step + slot)
    drift = torch.linspace(-1, 1, 16)[None, :, None] * (1 + 0.3 * step)
    return torch.randn(8, 16, 6, generator=generator) + drift


def batch(step: int, slots: Sequence[int]) -> torch.Tensor:
    return torch.stack([pictures(step, slot) for slot in slots])


def conv(name: str) -> nn.Conv2d:
    torch.manual_seed(1)
    kernel, stride, padding = CONVS[name]
    return nn.Conv2d(8, 4, kernel, stride, padding)


def norm() -> nn.GroupNorm:
    torch.manual_seed(2)
    layer = nn.GroupNorm(GROUPS, 8)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def attention(norm_groups: int | None = 2) -> Any:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(3)
    return Attention(query_dim=8, heads=2, dim_head=4, norm_num_groups=norm_groups, residual_connection=True)


PAYLOADS = [(torch.bfloat16, (5,)), (torch.float32, (3, 1)), (torch.uint8, (2, 3)), (torch.float16, (8,))]


class Network(nn.Module):
    """All kinds of layers in a row, with a pointwise one between them, as a compiler sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.conv, self.attention = (
            conv("stride 1"),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 8, 3, 1, 1),
            attention(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attention(self.conv(nn.functional.silu(self.norm(self.first(x)))))
        return result


def run(rank: int) -> dict[str, Any]:
    mesh = make_mesh((0, 1, 2, 3), device=CPU)
    assert mesh is not None
    with torch.inference_mode():
        found = _convs(mesh) | _norms(mesh) | _attention(mesh) | _slots(mesh) | _payloads(mesh) | _compiled(mesh)
        return found | _refusals()


def _link(mesh: Mesh, mode: str = "displaced", **options: Any) -> Link:
    link = Link(CPU)
    link.statistics = STATISTICS.get(mode, "corrected")
    link.connect(Exchange(mesh.rows, CPU, mode, **options))
    return link


def _call(link: Link, layer: Any, step: int, slots: Sequence[int], *, synchronous: bool) -> torch.Tensor:
    """A call of one layer on this rank's rows of a step's inputs."""
    assert link.exchange is not None
    link.exchange.begin(slots, synchronous=synchronous)
    x = batch(step, slots)
    result: torch.Tensor = layer(x if isinstance(layer, PatchInputConv2d) else x[:, :, link.exchange.place.rows(16)])
    link.exchange.finish()
    return result


def _steps(link: Link, layer: Any, steps: int = 3) -> list[torch.Tensor]:
    """The first step is synchronous, the others are not."""
    return [_call(link, layer, step, [0, 1], synchronous=step == 0) for step in range(steps)]


def _convs(mesh: Mesh) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in CONVS:
        link = _link(mesh)
        found[name] = _steps(link, PatchConv2d(conv(name), link, 0))
        link = _link(mesh)
        found[f"{name} at entry"] = _steps(link, PatchInputConv2d(conv(name), link, 0))
    link = _link(mesh, "no_sync")
    found["no_sync"] = _steps(link, PatchConv2d(conv("stride 1"), link, 0))
    return found


def _norms(mesh: Mesh) -> dict[str, Any]:
    found = {}
    for mode in STATISTICS:
        link = _link(mesh, mode)
        found[mode] = _steps(link, PatchGroupNorm(norm(), link, 0))
    return found


def _attention(mesh: Mesh) -> dict[str, Any]:
    link, layer = _link(mesh), attention(norm_groups=None)
    layer.set_processor(PatchSelfAttention(link, 0, layer.processor))
    return {"attention": _steps(link, layer)}


def _slots(mesh: Mesh) -> dict[str, Any]:
    """Calls of changing slots: (step of the inputs, slots, synchronous), a slot taken by another picture included."""
    link = _link(mesh, group_bytes=64)
    assert link.exchange is not None
    layer = PatchConv2d(conv("stride 1"), link, 0)
    calls: list[tuple[int, list[int], bool]] = [
        (0, [7], True),
        (0, [3, 5], True),
        (1, [5], False),
        (2, [7, 5], False),
        (3, [3], False),
        (4, [5, 3, 7], False),
    ]
    found = [_call(link, layer, step, slots, synchronous=warm) for step, slots, warm in calls]
    link.exchange.forget([5, 99])
    known = [link.exchange.knows(slot) for slot in (3, 5, 7)]
    found.append(_call(link, layer, 10, [5], synchronous=True))
    found.append(_call(link, layer, 11, [7, 5], synchronous=False))
    return {"slots": found, "known": known, "held": len(link.exchange)}


def payload(layer: int, part: int, step: int) -> torch.Tensor:
    """What a layer gives in `_payloads`, [2, ...], in sizes that fill no whole words."""
    dtype, shape = PAYLOADS[layer]
    return (torch.arange(2 * math.prod(shape)).view(2, *shape) + 10 * part + 50 * step + layer).to(dtype)


def _payloads(mesh: Mesh) -> dict[str, Any]:
    """Bare swaps of one or two rows, synchronous at every other step, whose results are written over."""
    found: dict[str, Any] = {}
    for slots in ([4], [4, 2]):
        exchange = Exchange(mesh.rows, CPU, group_bytes=24)
        steps: list[list[torch.Tensor]] = []
        for step in range(4):
            exchange.begin(slots, synchronous=step % 2 == 0)
            steps.append([])
            for layer in range(len(PAYLOADS)):
                fresh = payload(layer, mesh.rank, step)[: len(slots)]
                got = exchange.swap(layer, fresh, own=layer == 1, waited=False)
                steps[-1].append(got.clone())
                got.zero_()
                fresh.zero_()
            exchange.finish()
        exchange.settle()
        found[f"payloads {len(slots)}"] = steps
        found["row_bytes"] = exchange.row_bytes
    return found


def _compiled(mesh: Mesh) -> dict[str, Any]:
    results = []
    for compiled in (False, True):
        link, network = _link(mesh, group_bytes=1024), Network()
        network.first = PatchConv2d(network.first, link, 0)
        network.norm = PatchGroupNorm(network.norm, link, 1)
        network.conv = PatchConv2d(network.conv, link, 2)
        network.attention.group_norm = PatchGroupNorm(network.attention.group_norm, link, 3)
        network.attention.set_processor(PatchSelfAttention(link, 4, network.attention.processor))
        layer: Any = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else network
        results.append(_steps(link, layer, 4))
    return {"one by one": results[0], "compiled": results[1]}


def _refusals() -> dict[str, Any]:
    """What Exchange and make_mesh say to what they are not to be given."""
    found = []
    for ranks in ((0, 4), (0, 0), (1, 0), ()):
        try:
            make_mesh(ranks, device=CPU)
        except ValueError as error:
            found.append(str(error))
    return {"refusals": found}
