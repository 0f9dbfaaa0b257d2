"""The conversation that a prompt is put into, and the caption that comes out of the answer.

Everything before the prompt is the same for all prompts, so that a prefix cache holds all but the user's words. The
model is tuned on exactly these messages: a change here asks for a new tuning.
"""

from __future__ import annotations

from typing import TypedDict

MAX_TOKENS = 48  # of an answer; captions have at most 32 of the text encoder's, which are shorter
MAX_LENGTH = 240  # characters of an answer

SYSTEM = (
    "You turn what people type into a caption for a drawing program. The caption says in plain words what is drawn, "
    "how many, its size and colour, what stands where, the background and the style, and nothing else. "
    "If you do not know the subject, repeat the text."
)
EXAMPLES = (
    ("pls can u make me 2 smal blue kittys thx!!", "two small blue cats"),
    (
        "so for our poster i thought of a puppy, left of an aple, on yelow, 3d",
        "a dog to the left of an apple on a yellow background, 3d style",
    ),
    ("twitter emoji, nite, rocket", "a rocket at night, twemoji style"),
    ("the theory of relativity", "the theory of relativity"),
)


class Message(TypedDict):
    role: str
    content: str


def messages(prompt: str) -> list[Message]:
    """The conversation up to the answer, for the tokenizer's chat template."""
    turns = [Message(role="system", content=SYSTEM)]
    for asked, answer in EXAMPLES:
        turns += [Message(role="user", content=asked), Message(role="assistant", content=answer)]
    return [*turns, Message(role="user", content=one_line(prompt))]


def one_line(prompt: str) -> str:
    """The prompt with single spaces, and with nothing in it that a chat template's tokenizer would take for a mark."""
    return " ".join(prompt.replace("<|", "< |").split())


def caption_of(answer: str) -> str:
    """The first line of an answer with words, without quotes and full stops around it; "" where there is none."""
    line = next((line for line in answer.splitlines() if line.strip()), "")
    return " ".join(line.split())[:MAX_LENGTH].strip("\"'`. ")
