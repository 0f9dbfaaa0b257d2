"""The bodies that clients send. Types are checked here, ranges by `service.diffusion.admission`.

Each field's description is what an error message gives as allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails

from service.diffusion.request import Draft, parse_size
from service.errors import InputError, invalid

SIZE_TEXT = 'text "WIDTHxHEIGHT", such as "256x256"'
DEFAULT_QUALITY = 90  # of JPEG and WebP
MAX_NAME = 80  # characters of an unknown field's name that an error repeats
MAX_NAMED = 20  # fields that one error names


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LoraBody(Body):
    name: Annotated[str, Field(description="text, the name that the server loaded it under")]
    scale: Annotated[float, Field(description="a number, -4 to 4")] = 1.0


class DrawBody(Body):
    """What both drawing endpoints take."""

    prompt: Annotated[str, Field(description="text of 1 to 2000 characters")]
    negative_prompt: Annotated[str | None, Field(description="text of 0 to 2000 characters")] = None
    n: Annotated[int | None, Field(description="an integer, 1 to 8")] = None
    size: Annotated[str | None, Field(description=SIZE_TEXT)] = None
    num_inference_steps: Annotated[int | None, Field(description="an integer, 1 to 200")] = None
    guidance_scale: Annotated[float | None, Field(description="a number, 0 to 30")] = None
    sampler: Annotated[str | None, Field(description="text, a sampler that GET /v1/models lists")] = None
    seed: Annotated[int | None, Field(description="an integer, 0 to 4294967295, or -1 for a random one")] = None
    cache: Annotated[
        Literal["auto", "use", "bypass", "refresh"] | None, Field(description="auto, use, bypass or refresh")
    ] = None
    enhance_prompt: Annotated[
        bool | None, Field(description="true or false, whether the language model rewrites the prompt first")
    ] = None
    partial_images: Annotated[int | None, Field(description="an integer, 0 to 3, of a streamed reply")] = None
    stream: Annotated[bool | None, Field(description="true or false")] = None
    output_format: Annotated[Literal["png", "jpeg", "webp"] | None, Field(description="png, jpeg or webp")] = None
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="an integer, 0 to 100, the quality of JPEG and WebP")
    ] = None
    response_format: Annotated[Literal["b64_json"] | None, Field(description="b64_json")] = None
    user: Annotated[str | None, Field(description="text that names the end user; taken and not kept")] = None

    @property
    def names(self) -> dict[str, str]:
        """What this body calls a draft's fields, where that is not their name."""
        return {"loras": "lora"} | ({} if self.size is None else {"width": "size: width", "height": "size: height"})

    @property
    def quality(self) -> int:
        return DEFAULT_QUALITY if self.output_compression is None else self.output_compression

    def draft(self) -> Draft:
        """What is asked for, in the engine's words. Raises InputError for a size that is none."""
        width, height = self._sides()
        return Draft(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            n=self.n,
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            seed=self.seed,
            partial_images=self.partial_images,
        )

    def _sides(self) -> tuple[int | None, int | None]:
        return (None, None) if self.size is None else parse_size("size", self.size, SIZE_TEXT)


class GenerateBody(DrawBody):
    """POST /generate."""

    width: Annotated[int | None, Field(description="an integer, pixels")] = None
    height: Annotated[int | None, Field(description="an integer, pixels")] = None
    eta: Annotated[float | None, Field(description="a number, 0 to 1, of the sampler ddim")] = None
    class_label: Annotated[int | None, Field(description="an integer, of a class-conditional model")] = None
    timesteps: Annotated[
        list[int] | None, Field(description="a list of integers, decreasing, of a pixel-space consistency model")
    ] = None
    lora: Annotated[list[LoraBody] | None, Field(description='a list of {"name": text, "scale": number}')] = None
    priority: Annotated[int | None, Field(description="an integer, -10 to 10; higher runs earlier")] = None
    deadline_s: Annotated[float | None, Field(description="a number of seconds above 0")] = None
    patch_degree: Annotated[int | None, Field(description="an integer, how many GPUs share each picture")] = None
    request_id: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z0-9_.:/+=-]{1,128}$",
            description="text of 1 to 128 letters, digits and _ . : / + = -; sent again: the same reply",
        ),
    ] = None

    def draft(self) -> Draft:
        return replace(
            super().draft(),
            eta=self.eta,
            class_label=self.class_label,
            timesteps=None if self.timesteps is None else tuple(self.timesteps),
            loras=tuple((lora.name, lora.scale) for lora in self.lora or ()),
            priority=self.priority,
            deadline_s=self.deadline_s,
            patch_degree=self.patch_degree,
        )

    def _sides(self) -> tuple[int | None, int | None]:
        if self.size is None:
            return self.width, self.height
        width, height = super()._sides()
        if self.width not in (None, width) or self.height not in (None, height):
            given = f"width {self.width} and height {self.height}"
            raise invalid("size", self.size, f"it must agree with {given}, or be left out")
        return width, height


class ImagesBody(DrawBody):
    """POST /v1/images/generations: OpenAI's fields, and Headstart's own that its clients can send along."""

    model: Annotated[str | None, Field(description="the model that GET /v1/models lists")] = None
    background: Annotated[Literal["auto", "opaque"] | None, Field(description="auto or opaque")] = None
    quality_level: Annotated[
        Literal["auto", "standard"] | None, Field(alias="quality", description="auto or standard")
    ] = None
    style: Annotated[Literal["vivid"] | None, Field(description="vivid, which changes nothing")] = None
    moderation: Annotated[Literal["auto"] | None, Field(description="auto")] = None

    def _sides(self) -> tuple[int | None, int | None]:
        return (None, None) if self.size == "auto" else super()._sides()


def input_error(errors: list[ErrorDetails], body: type[Body]) -> InputError:
    """The first of pydantic's errors in Headstart's words, and the names of the other fields at fault."""
    error = _in_words(errors[0], body)
    others = sorted({_path(other) for other in errors[1:]} - {_path(errors[0])})
    if others:
        more = ", ".join(others[:MAX_NAMED]) + (", ..." if len(others) > MAX_NAMED else "")
        error = InputError(f"{error.message} (also wrong: {more})", param=error.param, code=error.code)
    return error


def _in_words(error: ErrorDetails, body: type[Body]) -> InputError:
    path = _path(error)
    fields = {field.alias or name: field for name, field in body.model_fields.items()}
    if error["type"] == "extra_forbidden":
        known = _body_at(body, error["loc"]).model_fields
        names = sorted(field.alias or name for name, field in known.items())
        message = f"{path}: unknown field; the fields are {', '.join(names)}"
        return InputError(message, param=path, code="unknown_field")
    if not error["loc"]:
        return invalid("body", error["input"], "a JSON object")
    allowed = fields[str(error["loc"][0])].description or ""
    if error["type"] == "missing":
        return InputError(f"{path}: missing; {allowed}", param=path, code="missing_field")
    return invalid(path, error["input"], allowed)


def _body_at(body: type[Body], path: Sequence[int | str]) -> type[Body]:
    """The model of the object that a path's last part is a field of."""
    for part in path[:-1]:
        if isinstance(part, str) and part in body.model_fields:
            body = next(_bodies_in(body.model_fields[part].annotation), body)
    return body


def _bodies_in(annotation: Any) -> Iterator[type[Body]]:
    if isinstance(annotation, type) and issubclass(annotation, Body):
        yield annotation
    for argument in get_args(annotation):
        yield from _bodies_in(argument)


def _path(error: ErrorDetails) -> str:
    path = ".".join(str(part) for part in error["loc"])
    return path if len(path) <= MAX_NAME else path[:MAX_NAME] + "..."
