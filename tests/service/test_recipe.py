from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.config import version
from service.diffusion.request import ImageRequest
from service.recipe import Recipe, recipe_of

PARAMETERS = {"Steps": "4", "Sampler": "LCM", "CFG scale": "2", "Seed": "7", "Size": "256x256", "Model": "default"}
LINE = "Steps: 4, Sampler: LCM, CFG scale: 2, Seed: 7, Size: 256x256, Model: default"
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tricky = st.lists(st.sampled_from(["a", "\n", "Negative prompt: ", "Steps: 4", ", ", '"', "\\", ": ", " ", "é", "🦊"]))
prompts = text | tricky.map("".join)


@given(prompts, prompts, text)
@example("a\nNegative prompt: b", "", "m")
@example("a", "b\nNegative prompt: c", "m")
@example("Negative prompt: b", "", "m")
@example("a\nSteps: 4, Seed: 3", "", "m")
@example("", "Steps: 4", "a, b: c")
@example("a\r\n", "\n", '"')
def test_any_prompt_and_model_name_come_back(prompt: str, negative_prompt: str, model: str) -> None:
    recipe = Recipe(prompt, negative_prompt, PARAMETERS | {"Model": model})
    assert Recipe.from_text(recipe.to_text()) == recipe


def test_the_layout_is_the_customary_one() -> None:
    assert Recipe("a fox", "blur", PARAMETERS).to_text() == f"a fox\nNegative prompt: blur\n{LINE}"
    assert Recipe("a fox,\nred", "", PARAMETERS).to_text() == f"a fox,\nred\n{LINE}"


def test_text_of_other_programs() -> None:
    written = (
        'a fox\nNegative prompt: blur,\nfog\nSteps: 20, Sampler: Euler a, Lora hashes: "a: 1, b: 2", Version: v1.9'
    )
    recipe = Recipe.from_text(written)
    assert (recipe.prompt, recipe.negative_prompt) == ("a fox", "blur,\nfog")
    assert recipe.parameters == {"Steps": "20", "Sampler": "Euler a", "Lora hashes": "a: 1, b: 2", "Version": "v1.9"}
    assert Recipe.from_text("just words") == Recipe("just words")


@pytest.mark.parametrize(
    ("field", "key", "shown"),
    [
        ({"eta": 0.5}, "Eta", "0.5"),
        ({"class_label": 3}, "Class", "3"),
        ({"timesteps": (22, 0)}, "Timesteps", "22, 0"),
        ({"loras": (("ink", 0.8), ("moss", 1.0))}, "LoRA", "ink:0.8, moss:1"),
        ({"sampler": "euler_a"}, "Sampler", "Euler a"),
        ({"sampler": "brand_new"}, "Sampler", "brand_new"),
    ],
)
def test_what_a_request_is_drawn_from(field: dict[str, object], key: str, shown: str) -> None:
    plain = {
        "id": "1",
        "prompt": "a fox",
        "negative_prompt": "",
        "n": 2,
        "width": 256,
        "height": 192,
        "steps": 4,
        "guidance_scale": 2.0,
        "sampler": "lcm",
        "eta": 0.0,
        "seed": 7,
    }
    recipe = recipe_of(ImageRequest(**(plain | field)), 8, "default")  # type: ignore[arg-type]
    line = PARAMETERS | {"Seed": "8", "Size": "256x192", "Version": f"headstart {version()}", key: shown}
    assert recipe == Recipe("a fox", "", line)
    skipped = recipe_of(ImageRequest(**(plain | field)), 8, "default", 3)  # type: ignore[arg-type]
    assert skipped == Recipe("a fox", "", line | {"Cache": "3 of 4 steps skipped"})
    assert Recipe.from_text(recipe.to_text()) == recipe
