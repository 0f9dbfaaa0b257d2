"""What four ranks do for test_patch_denoiser.py: they draw with tiny models and rank 0 measures how far the results are
from those of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from accel.patch.mesh import Mesh, make_mesh
from accel.samplers.library import build_plan
from accel.samplers.noise import gaussian
from accel.samplers.plans import Plan
from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from models.diffusion.model import Condition
from models.diffusion.patch_denoiser import PatchDenoiser
from models.diffusion.patch_vae import PatchDecoder
from models.errors import PatchError

CPU = torch.device("cpu")
SHAPE = (4, 16, 9)  # an odd number of columns: the network then sizes what it upsamples by what it kept
STEPS = 10
# Kind of model -> (degree, whether guidance branches are shared out) at which it is drawn.
WAYS = {
    "sd": ((2, True), (4, False)),
    "sd2": ((4, True),),
    "sdxl": ((2, False), (4, True)),
    "lcm": ((4, True),),
}


class Job(NamedTuple):
    """One picture: from tick `begins` on it is in the batch, at row `first` of its plan, in latent slot `slot`."""

    seed: int
    condition: Condition
    slot: int
    begins: int = 0
    first: int = 0


class Group:
    """A mesh, and the pipe through which its leader tells the others."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.told: list[Any] = []

    def tell(self, call: Any) -> None:
        self.told.append(call)
        for rank in self.mesh.ranks[1:]:
            dist.send_object_list([call], rank)

    def lead(self, patch: Any, action: Callable[[], Any]) -> Any:
        """`action` on the leader, while the others follow; None on the others."""
        if self.mesh.leads:
            self.told = []
            result = action()
            self.tell(None)
            return result
        heard: list[Any] = [None]
        while dist.recv_object_list(heard, 0) is not None and heard[0] is not None:
            patch.follow(heard[0])
        return None

    def denoiser(self, model: LoadedModel, sampler: str = "ddim", **options: Any) -> PatchDenoiser:
        tell = self.tell if self.mesh.leads else None
        return PatchDenoiser(model.denoiser(sampler, model.loras.active), self.mesh, tell, **options)


def draw(
    network: Callable[..., torch.Tensor],
    plan: Plan,
    jobs: Sequence[Job],
    *,
    shape: tuple[int, int, int] = SHAPE,
    known: bool = False,
) -> list[torch.Tensor]:
    """The jobs' latents, all that are in progress at a tick in one batch; `known`: the network is told the slots."""
    latents = [gaussian(torch.tensor([job.seed]), job.first - 1, shape)[0] for job in jobs]
    before = [torch.zeros(shape)] * len(jobs)
    for tick in range(max(job.begins for job in jobs) + len(plan)):
        rows = [job.first + tick - job.begins for job in jobs]
        mine = [i for i, (job, row) in enumerate(zip(jobs, rows, strict=True)) if job.first <= row < len(plan)]
        if not mine:
            continue
        steps = [plan.rows[rows[i]] for i in mine]
        t, alpha = (torch.tensor([getattr(step, name) for step in steps]) for name in ("t", "alpha"))
        told = {"slots": [jobs[i].slot for i in mine], "ran": [rows[i] - jobs[i].first for i in mine]} if known else {}
        x = torch.stack([latents[i] for i in mine])
        with torch.no_grad():
            denoised = network(x, t, alpha, [jobs[i].condition for i in mine], **told)
        for i, step, estimate in zip(mine, steps, denoised.clone(), strict=True):
            noise = gaussian(torch.tensor([jobs[i].seed]), rows[i], shape)[0]
            latents[i] = step.a * latents[i] + step.b * estimate + step.c * before[i] + step.s * noise
            before[i] = estimate
    return latents


def distance(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The worst picture's largest difference over its largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))


def spread(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Root of the mean square of the difference, over that of what is wanted."""
    a, b = torch.stack(list(got)), torch.stack(list(wanted))
    return float((a - b).norm() / b.norm())


def check(rank: int, folders: dict[str, Path]) -> dict[str, Any]:
    """All measurements, by name; on rank 0."""
    meshes = [make_mesh(range(degree), device=CPU) for degree in (2, 3, 4)]
    groups = {mesh.degree: Group(mesh) for mesh in meshes if mesh is not None}
    found: dict[str, Any] = {}
    models = {
        kind: load_model(str(path), dtype="float32", device="cpu", cache_dir=path) for kind, path in folders.items()
    }
    for kind in WAYS:
        _equality(found, groups, kind, models[kind])
    _staleness(found, groups[4], models["sd2"])
    _batches(found, groups[4], models["sd2"])
    for degree in (2, 4):
        if degree in groups:
            _decoding(found, groups[degree], models["sd"])
    if 2 in groups:
        _loras(found, groups[2], models["bundle"])
    if 3 in groups:
        _odd(found, groups[3], models["sd"])
    return found


def _conditions(model: LoadedModel, sampler: str, scales: Sequence[float]) -> list[Condition]:
    prompts = [("a red apple", "blue"), ("two cats", ""), ("a fox", "dog"), ("a green dog on blue", "")]
    return model.encode(prompts[: len(scales)], scales, sampler, (72, 128))


def _plan(model: LoadedModel, sampler: str, steps: int = STEPS) -> Plan:
    return build_plan(sampler, model.schedule(sampler, model.loras.active), steps, spacing="trailing")


def _equality(found: dict[str, Any], groups: dict[int, Group], kind: str, model: LoadedModel) -> None:
    """Full synchronous runs of two pictures against one rank's, whose modules are still diffusers' own."""
    sampler = "lcm" if kind == "lcm" else "ddim"
    plan = _plan(model, sampler)
    # Stronger guidance of a tiny random SDXL grows a rounding error a thousandfold in ten steps.
    jobs = [Job(seed, condition, seed) for seed, condition in enumerate(_conditions(model, sampler, [1.5, 2.0]))]
    leads = groups[4].mesh.leads
    wanted = draw(model.denoiser(sampler), plan, jobs) if leads else []
    for degree, split in WAYS[kind]:
        if degree in groups:
            patch = groups[degree].denoiser(model, sampler, mode="full_sync", split_guidance=split)
            got = groups[degree].lead(patch, lambda patch=patch: draw(patch, plan, jobs, known=True))
            if got is not None:
                found[f"equal {kind} {degree} {split}"] = distance(got, wanted)
    if leads:
        found[f"afterwards {kind}"] = distance(draw(model.denoiser(sampler), plan, jobs), wanted)


def _staleness(found: dict[str, Any], group: Group, model: LoadedModel) -> None:
    """How far each mode is from one rank after a run."""
    plan = _plan(model, "ddim", STEPS)
    jobs = [Job(seed, condition, seed) for seed, condition in enumerate(_conditions(model, "ddim", [3.0, 5.0]))]
    wanted = draw(model.denoiser("ddim"), plan, jobs) if group.mesh.leads else []
    for mode in ("displaced", "no_sync", "stale_gn", "separate_gn", "sync_gn"):
        patch = group.denoiser(model, mode=mode, warm_up=2)
        got = group.lead(patch, lambda patch=patch: draw(patch, plan, jobs, known=True))
        if got is not None:
            found[mode] = spread(got, wanted)


def _batches(found: dict[str, Any], group: Group, model: LoadedModel) -> None:
    """Pictures that join, leave and reuse slots, with and without guidance, against each drawn alone."""
    plan = _plan(model, "ddim", 5)
    conditions = _conditions(model, "ddim", [3.0, 5.0, 1.0])
    jobs = [
        Job(0, conditions[0], slot=0),
        Job(1, conditions[1], slot=3, begins=1, first=1),
        Job(2, conditions[2], slot=1, begins=3),
        Job(3, conditions[1], slot=0, begins=5),
    ]
    for split in (True, False):
        some = jobs if split else [jobs[0], jobs[2]._replace(begins=1)]
        patch = group.denoiser(model, warm_up=2, split_guidance=split)
        together = group.lead(patch, lambda patch=patch, some=some: draw(patch, plan, some, known=True))
        calls = [(call.split, call.synchronous, call.slots) for call in group.told if call is not None]
        alone = []
        for job in some:
            one = group.denoiser(model, warm_up=2, split_guidance=split)
            alone += group.lead(one, lambda one=one, job=job: draw(one, plan, [job], known=True)) or []
        if group.mesh.leads:
            exact = [draw(model.denoiser("ddim"), plan, [job])[0] for job in some]
            found[f"together {split}"] = distance(together, alone)
            found[f"displaced {split}"] = distance(together, exact)
            found[f"calls {split}"] = calls


def _loras(found: dict[str, Any], group: Group, model: LoadedModel) -> None:
    """One UNet, with a LoRA of its convolutions and without, at both of which pictures are in progress."""
    jobs, wanted, plans = {}, {}, {}
    for loras in ((("lcm-lora", 1.0),), ()):
        model.use_loras(loras)
        plans[loras] = _plan(model, "ddim", 5)
        jobs[loras] = [Job(7, _conditions(model, "ddim", [3.0])[0], slot=0)]
        wanted[loras] = draw(model.denoiser("ddim"), plans[loras], jobs[loras])
    found["lora acts"] = distance(*wanted.values())
    for mode in ("full_sync", "displaced"):
        patch = group.denoiser(model, mode=mode, split_guidance=False)
        for loras in ((("lcm-lora", 1.0),), ()):
            model.use_loras(loras)
            got = group.lead(patch, lambda loras=loras, patch=patch: draw(patch, plans[loras], jobs[loras], known=True))
            if got is not None:
                found[f"lora {bool(loras)} {mode}"] = distance(got, wanted[loras])


def _odd(found: dict[str, Any], group: Group, model: LoadedModel) -> None:
    """An odd number of ranks, which share out rows only; and a height that they cannot share out."""
    shape = (4, 12, 8)
    plan = _plan(model, "ddim", 3)
    jobs = [Job(0, _conditions(model, "ddim", [2.0])[0], slot=0)]
    patch = group.denoiser(model, mode="full_sync")
    got = group.lead(patch, lambda: draw(patch, plan, jobs, shape=shape, known=True))
    if got is not None:
        found["odd"] = distance(got, draw(model.denoiser("ddim"), plan, jobs, shape=shape))

    def refused() -> str:
        try:
            draw(patch, plan, jobs, shape=(4, 16, 8))
        except PatchError as error:
            return str(error)
        return ""

    found["refused"] = group.lead(patch, refused), len(group.told)


def _decoding(found: dict[str, Any], group: Group, model: LoadedModel) -> None:
    latents = gaussian(torch.tensor([1, 2]), 0, SHAPE)
    wanted = model.decode(latents)
    decoder = PatchDecoder(model.decoder, group.mesh, group.tell if group.mesh.leads else None)
    got = group.lead(decoder, lambda: decoder(latents))
    if got is not None:
        found[f"decode {group.mesh.degree}"] = int((got.int() - wanted.int()).abs().max()), tuple(got.shape)
