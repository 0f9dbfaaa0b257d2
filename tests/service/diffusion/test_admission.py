from __future__ import annotations

import math
from dataclasses import replace

import pytest

from models.diffusion.model import SamplerDefaults, StudentLora
from service.config import EngineSettings
from service.diffusion.admission import resolve
from service.diffusion.request import Draft, ImageRequest
from service.errors import InputError
from service.events import MAX_SEED
from tests.service.diffusion.toy import CARD

CLASSES = replace(
    CARD,
    kind="consistency",
    max_prompt_tokens=None,
    num_classes=10,
    default_sampler="consistency",
    samplers={"consistency": SamplerDefaults(steps=1, guidance_scale=1.0, spacing="trailing")},
)
PIXELS = replace(
    CLASSES,
    num_classes=None,
    samplers={"consistency": SamplerDefaults(steps=1, guidance_scale=1.0, spacing="leading", max_steps=40)},
)
DISTILLED = SamplerDefaults(steps=2, guidance_scale=3.0, spacing="trailing", max_steps=40, fixed_guidance=True)
STUDENTS = replace(
    CARD,
    samplers={**CARD.samplers, "consistency": DISTILLED},
    loras=("fast", "ink", "tuned"),
    student_loras={
        "fast": StudentLora("lcm", replace(DISTILLED, steps=4, guidance_scale=2.5, max_steps=50)),
        "tuned": StudentLora("consistency", replace(DISTILLED, guidance_scale=1.0)),
    },
)
BY_LORA = replace(CARD, samplers={**CARD.samplers, "lcm": SamplerDefaults(4, 1.0, "trailing", needs_lora=True)})
LIMITS = EngineSettings(max_pixels=256 * 256)


def resolved(card=CARD, **fields) -> ImageRequest:
    return resolve(Draft(**{"prompt": "a fox", **fields}), card, LIMITS, id="r1", random_seed=99)


def test_what_is_left_out_comes_from_the_model():
    assert resolved() == ImageRequest(
        id="r1", prompt="a fox", negative_prompt="", n=1, width=64, height=64, steps=20, guidance_scale=5.0,
        sampler="ddim", eta=0.0, seed=99,
    )  # fmt: skip


def test_a_sampler_brings_its_own_defaults():
    request = resolved(sampler="lcm")
    assert (request.steps, request.guidance_scale) == (4, 1.5)
    assert resolved(sampler="lcm", guidance_scale=9.0).guidance_scale == 9.0


def test_what_is_asked_for_is_kept():
    fields = {
        "negative_prompt": "dull",
        "n": 8,
        "width": 128,
        "height": 96,
        "num_inference_steps": 200,
        "guidance_scale": 30.0,
        "sampler": "ddim",
        "eta": 1.0,
        "seed": MAX_SEED,
        "priority": -10,
        "partial_images": 3,
        "deadline_s": 0.5,
        "loras": (("moss", -4.0), ("ink", 1.0)),
    }
    request = resolved(**fields)
    assert request.steps == fields.pop("num_inference_steps")
    assert request.loras == tuple(sorted(fields.pop("loras")))
    assert {name: getattr(request, name) for name in fields} == fields


@pytest.mark.parametrize("seed", [None, -1])
def test_a_missing_seed_is_the_random_one(seed):
    assert resolved(seed=seed).seed == 99


def test_blanks_around_a_prompt_go_and_newlines_in_it_stay():
    assert resolved(prompt="  a fox\n\tin snow ").prompt == "a fox\n\tin snow"
    assert len(resolved(prompt="x" * 2000).prompt) == 2000


def test_a_model_without_text_needs_a_class_and_no_prompt():
    request = resolved(CLASSES, prompt="", class_label=9)
    assert (request.prompt, request.class_label) == ("", 9)


@pytest.mark.parametrize(
    ("fields", "param", "allowed"),
    [
        ({"prompt": ""}, "prompt", "1 to 2000"),
        ({"prompt": " \n "}, "prompt", "1 to 2000"),
        ({"prompt": "x" * 2001}, "prompt", "1 to 2000"),
        ({"prompt": "a\x00b"}, "prompt", "control"),
        ({"prompt": "a\ud800"}, "prompt", "control"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt", "0 to 2000"),
        ({"n": 0}, "n", "1 to 8"),
        ({"n": 9}, "n", "1 to 8"),
        ({"width": 65}, "width", "multiples of 16"),
        ({"width": 72}, "width", "multiples of 16"),
        ({"height": 48}, "height", "from 64"),
        ({"height": -64}, "height", "from 64"),
        ({"width": 512, "height": 512}, "size", "65536 pixels"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 200"),
        ({"num_inference_steps": 201}, "num_inference_steps", "1 to 200"),
        ({"sampler": "lcm", "num_inference_steps": 51}, "num_inference_steps", "1 to 50 with the sampler lcm"),
        ({"guidance_scale": -0.1}, "guidance_scale", "0 to 30"),
        ({"guidance_scale": 30.5}, "guidance_scale", "0 to 30"),
        ({"guidance_scale": math.nan}, "guidance_scale", "0 to 30"),
        ({"guidance_scale": math.inf}, "guidance_scale", "0 to 30"),
        ({"sampler": "plms"}, "sampler", "ddim, dpmpp_2m, dpmpp_2m_sde, euler, euler_a, lcm"),
        ({"eta": 1.5}, "eta", "0 to 1"),
        ({"eta": 0.5, "sampler": "euler"}, "eta", "only the sampler ddim"),
        ({"seed": -2}, "seed", str(MAX_SEED)),
        ({"seed": MAX_SEED + 1}, "seed", str(MAX_SEED)),
        ({"class_label": 0}, "class_label", "no classes"),
        ({"loras": (("oil", 1.0),)}, "loras", "ink, moss"),
        ({"loras": (("ink", 4.1),)}, "loras", "-4 to 4"),
        ({"loras": (("ink", math.nan),)}, "loras", "-4 to 4"),
        ({"loras": (("ink", 1.0), ("ink", 0.5))}, "loras", "each name once"),
        ({"priority": 11}, "priority", "-10 to 10"),
        ({"partial_images": 4}, "partial_images", "0 to 3"),
        ({"deadline_s": 0.0}, "deadline_s", "above 0"),
        ({"deadline_s": math.inf}, "deadline_s", "above 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(fields, param, allowed):
    with pytest.raises(InputError) as caught:
        resolved(**fields)
    assert caught.value.param == param
    assert caught.value.status == 422
    assert caught.value.message.startswith(f"{param}: ")
    assert allowed in caught.value.message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sampler": "consistency"}, ("consistency", 2, 3.0)),
        ({"sampler": "consistency", "guidance_scale": 3.0, "num_inference_steps": 40}, ("consistency", 40, 3.0)),
        ({"sampler": "lcm", "guidance_scale": 9.0}, ("lcm", 4, 9.0)),
        ({"loras": (("fast", 1.0),)}, ("lcm", 4, 2.5)),
        ({"loras": (("fast", 0.5), ("ink", 1.0)), "sampler": "lcm"}, ("lcm", 4, 2.5)),
        ({"loras": (("tuned", 1.0),), "guidance_scale": 1.0}, ("consistency", 2, 1.0)),
        ({"loras": (("ink", 1.0),)}, ("ddim", 20, 5.0)),
    ],
)
def test_a_student_brings_its_sampler_steps_and_guidance(fields, expected):
    request = resolved(STUDENTS, **fields)
    assert (request.sampler, request.steps, request.guidance_scale) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sampler": "consistency", "guidance_scale": 5.0},
            "guidance_scale: 5.0 is not allowed; 3 or nothing: this network for the sampler consistency was distilled",
        ),
        ({"loras": (("fast", 1.0),), "guidance_scale": 1.0}, "guidance_scale: 1.0 is not allowed; 2.5 or nothing"),
        (
            {"sampler": "consistency", "num_inference_steps": 41},
            "num_inference_steps: 41 is not allowed; 1 to 40 with the sampler consistency",
        ),
        ({"sampler": "consistency", "num_inference_steps": 0}, "num_inference_steps: 0 is not allowed; 1 to 40"),
        ({"sampler": "consistency", "eta": 0.5}, "eta: 0.5 is not allowed; only the sampler ddim"),
        (
            {"sampler": "ddim", "loras": (("fast", 1.0),)},
            "loras: 'fast' is not allowed; it was made for the sampler lcm, not for ddim",
        ),
        (
            {"loras": (("fast", 1.0), ("tuned", 1.0))},
            "loras: ['fast', 'tuned'] is not allowed; at most one of them",
        ),
    ],
)
def test_what_a_student_cannot_do_is_named(fields, message):
    with pytest.raises(InputError) as caught:
        resolved(STUDENTS, **fields)
    assert caught.value.message.startswith(message)
    assert caught.value.status == 422


def test_a_sampler_that_needs_a_lora_is_refused_without_one():
    assert resolved(BY_LORA, sampler="lcm", loras=(("ink", 1.0),), guidance_scale=1.5).guidance_scale == 1.5
    with pytest.raises(
        InputError, match=r"sampler: 'lcm' is not allowed; .* with a LoRA made for it; loaded: ink, moss"
    ):
        resolved(BY_LORA, sampler="lcm")


def test_timesteps_stand_in_place_of_a_number_of_steps():
    request = resolved(PIXELS, prompt="", timesteps=(22, 0))
    assert (request.timesteps, request.steps) == ((22, 0), 2)
    assert resolved(PIXELS, prompt="", timesteps=(39, 22, 0), num_inference_steps=3).steps == 3
    assert resolved(PIXELS, prompt="").timesteps == ()


@pytest.mark.parametrize(
    ("card", "fields", "told"),
    [
        (CARD, {"timesteps": (22, 0)}, "timesteps: [22, 0] is not allowed; only a consistency model in pixel space"),
        (STUDENTS, {"sampler": "consistency", "timesteps": (22, 0)}, "only a consistency model in pixel space"),
        *(
            (PIXELS, {"timesteps": timesteps}, "integers up to 39, strictly decreasing, the last of them 0")
            for timesteps in ((), (0, 22), (22, 0, 0), (40, 0), (22, 0, -1), (39, 22))
        ),
        (
            PIXELS,
            {"timesteps": (22, 0), "num_inference_steps": 3},
            "num_inference_steps: 3 is not allowed; 2 or nothing",
        ),
    ],
)
def test_timesteps_that_cannot_be_had(card, fields, told):
    with pytest.raises(InputError) as caught:
        resolved(card, **fields)
    assert told in caught.value.message


@pytest.mark.parametrize("label", [None, -1, 10])
def test_a_class_conditional_model_names_its_classes(label):
    with pytest.raises(InputError, match="0 to 9"):
        resolved(CLASSES, prompt="", class_label=label)
