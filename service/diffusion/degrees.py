"""How many GPUs share a picture: its patch degree.

A picture that several GPUs share is done sooner, and costs more GPU time in all than the same picture on one of them.
So small pictures are spread over the GPUs whole, and large ones, in whose steps the exchange between GPUs hardly shows,
are split. Where the line is, is measured when the service starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from models.diffusion.model import DiffusionModel
from models.diffusion.patch import PatchPlan, patch_plan
from models.errors import PatchError
from service.diffusion.orders import degrees_of
from service.errors import SetupError, invalid

WORTHWHILE = 0.65  # a split must leave so much of each GPU's time: 1.3 times as fast on 2, 2.6 times on 4

Loras = Sequence[tuple[str, float]]


class Degrees:
    """Which degrees requests may ask for, and which they get that ask for none.

    Args:
        default: of requests that ask for none, or less where the picture's size does not allow it; None: the fastest
            that is worth it, once `seconds` are known.

    Raises:
        SetupError: the default needs more GPUs than there are, or a model of another kind.
    """

    def __init__(self, model: DiffusionModel, gpus: int, default: int | None) -> None:
        self._model = model
        self._gpus = gpus
        self._default = default
        self.seconds: Mapping[
            int, Mapping[int, float]
        ] = {}  # of a step of one picture, by latent cells, then by degree
        if default is not None and default > 1:
            if default > gpus:
                message = f"ranks.patch_degree: {default} is not allowed; at most the number of GPUs, {gpus}"
                raise SetupError(message, param="ranks.patch_degree")
            try:
                patch_plan(model.denoiser(model.card.default_sampler))
            except PatchError as error:
                raise SetupError(f"ranks.patch_degree: {error}", param="ranks.patch_degree") from None

    @property
    def automatic(self) -> bool:
        return self._default is None

    def choose(
        self, asked: int | None, sampler: str, loras: Loras, size: tuple[int, int], guidance_scale: float
    ) -> int:
        """The patch degree of pictures of `size`, (width, height) in pixels.

        Raises:
            InputError: it cannot be the one asked for; says what could.
        """
        if asked is not None and asked not in (1, *degrees_of(self._gpus)):
            known = ", ".join(map(str, (1, *degrees_of(self._gpus))))
            raise invalid("patch_degree", asked, f"this server draws on {self._gpus} GPUs: one of {known}")
        scale = self._model.card.scale
        rows, cells = size[1] // scale, size[0] // scale * (size[1] // scale)
        guided = guidance_scale > 1 and not getattr(self._model.denoiser(sampler, loras), "guides_itself", True)
        try:
            plan = patch_plan(self._model.denoiser(sampler, loras))
            if asked is not None:
                plan.check(asked, rows, guided=guided)
                return asked
        except PatchError as error:
            if asked in (None, 1):
                return 1
            raise invalid("patch_degree", asked, str(error)) from None
        allowed = fitting(plan, self._gpus, rows, guided=guided)
        return (
            self._fastest(allowed, cells)
            if self._default is None
            else max(each for each in allowed if each <= self._default)
        )

    def _fastest(self, allowed: Sequence[int], cells: int) -> int:
        if not self.seconds:
            return 1
        nearest = max((each for each in self.seconds if each <= cells), default=min(self.seconds))
        seconds = self.seconds[nearest]
        return max(
            each
            for each in allowed
            if each == 1 or (each in seconds and seconds[1] >= WORTHWHILE * each * seconds[each])
        )


def fitting(plan: PatchPlan, gpus: int, rows: int, *, guided: bool) -> list[int]:
    """The degrees that pictures of so many latent rows can be drawn at, 1 among them."""
    possible = plan.degrees(rows, gpus, guided=guided)
    return [1, *(degree for degree in degrees_of(gpus) if degree in possible)]
