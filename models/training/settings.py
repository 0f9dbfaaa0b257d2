"""Sizes and time budgets of a training run, as data."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Preset:
    """Everything about a run's size. Batches are global: each rank takes its share.

    large_every: one in so many steps is on pictures of twice the side, a quarter of the batch.
    lora_…: of the LCM-LoRA, and of the consistency LoRAs, which have consistency_rank.
    distilled_guidance: the one scale that students without a guidance input are distilled at.
    validated: renders of each kind that the scorer is measured on.
    searched: prompts that time points of consistency models are searched with.
    shown: prompts of a sheet.
    """

    name: str
    resolution: int
    vae_widths: tuple[int, ...]
    vae_groups: int
    vae_batch: int
    vae_rate: float
    unet_widths: tuple[int, ...]
    unet_layers: int
    unet_heads: int
    unet_groups: int
    unet_batch: int
    teacher_rate: float
    warm_up: int
    guidance_width: int
    student_rate: float
    lora_batch: int
    lora_rate: float
    lora_rank: int
    consistency_rank: int
    distilled_guidance: float
    ring: int
    ring_start: int
    refill: int
    refill_every: int
    large_every: int
    scorer_batch: int
    scorer_rate: float
    validated: int
    searched: int
    shown: int
    icons: tuple[str, ...] | None
    log_every: int
    seed: int = 0

    def for_one_of(self, ranks: int) -> "Preset":
        """The same shapes on one process as on each of `ranks`: batches are divided."""
        names = ("vae_batch", "unet_batch", "lora_batch", "scorer_batch")
        return replace(self, **{name: getattr(self, name) // ranks for name in names})

    @property
    def latent(self) -> int:
        """Side of the latent grid; the VAE halves the picture three times."""
        return self.resolution // 8


FULL = Preset(
    name="full",
    resolution=256,
    vae_widths=(32, 48, 96, 192),
    vae_groups=4,
    vae_batch=128,
    vae_rate=1e-3,
    unet_widths=(128, 192, 224),
    unet_layers=2,
    unet_heads=4,
    # Eight groups rather than 32: a group then spans 16 channels, one memory sector in channels-last layout.
    unet_groups=8,
    unet_batch=512,
    teacher_rate=1.5e-3,
    warm_up=300,
    guidance_width=256,
    student_rate=3e-4,
    lora_batch=256,
    lora_rate=1e-3,
    lora_rank=16,
    consistency_rank=32,
    distilled_guidance=3.0,
    ring=65_536,
    ring_start=12_288,
    refill=512,
    refill_every=20,
    large_every=5,
    scorer_batch=512,
    scorer_rate=1e-3,
    validated=256,
    searched=192,
    shown=64,
    icons=None,
    log_every=250,
)

MINIATURE = Preset(
    name="miniature",
    resolution=64,
    vae_widths=(8, 16, 16, 16),
    vae_groups=4,
    vae_batch=8,
    vae_rate=3e-3,
    unet_widths=(32, 32, 32),
    unet_layers=1,
    unet_heads=2,
    unet_groups=8,
    unet_batch=16,
    teacher_rate=2e-3,
    warm_up=5,
    guidance_width=32,
    student_rate=5e-4,
    lora_batch=16,
    lora_rate=2e-3,
    lora_rank=4,
    consistency_rank=4,
    distilled_guidance=3.0,
    ring=256,
    ring_start=64,
    refill=16,
    refill_every=4,
    large_every=3,
    scorer_batch=16,
    scorer_rate=1e-3,
    validated=16,
    searched=8,
    shown=4,
    icons=("red-circle", "blue-heart", "star", "rock", "green-apple", "orange-circle", "red-heart", "cloud"),
    log_every=20,
)


@dataclass(frozen=True)
class Budgets:
    """Wall-clock seconds of each trained stage."""

    vae: float
    scorer: float
    teacher: float
    lcm: float
    lcm_lora: float
    consistency: float
    consistency_training: float
