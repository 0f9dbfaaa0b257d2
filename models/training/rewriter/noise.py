"""What people do to a prompt: typos, text-speak, clutter, asides, wishes that cannot be drawn.

A star before a phrase keeps it out of training, as in `wordings`: with `unseen`, starred ones are used instead of the
others. The words of a subject are joined by JOIN while noise is added, so that only typos touch them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence

JOIN = "_"

OPENERS = (
    "pls can u make me", "please draw me", "can you make", "could you please draw", "hey, i need", "i want", "i'd like",
    "gimme", "make me", "ok so draw", "hi! can i get", "generate", "create", "i would like to have", "show me plz",
    "need", "hello, please make", "umm maybe", "i wanna see", "pls", "plz draw", "imagine", "/imagine", "prompt:",
    "let's try", "how about", "what about", "just", "try to draw", "a picture with", "pic of", "render",
    "*yo can ya whip up", "*kindly produce", "*hiya, any chance of", "*would u mind doing", "*wld luv", "*i require",
)  # fmt: skip
CLOSERS = (
    "thx", "thanks!!", "pls", "please", "thank you so much", "asap", "lol", "haha", "if you can", ", thanks in advance",
    ", 4k", ", high quality", ", highly detailed", ", masterpiece, best quality", ", trending on artstation", "!!!",
    ", ultra hd, 8k", "ok?", "...", "??", ":)", "for free", "real quick", ", sharp focus", "or something like that",
    "you know", "--v 5", ", award winning",
    "*cheers mate", "*ty!!", "*when u get a sec", "*, octane render, vray", "*xoxo", "*much appreciated", "*k thx bye",
)  # fmt: skip
BEFORE = (
    "so i was thinking about this all day and", "my sister told me that this tool is great, so",
    "this is for a presentation at work tomorrow,", "i am not good with words but", "ok this may sound strange but",
    "we tried this last week and it did not work,", "i have never done this before,", "for our little project we need",
    "not sure how to say it, basically", "my nephews keep asking me for it:", "it is for my website and i want to have",
    "since you ask what i would like,", "we talked about it for hours and in the end we said", "long story short,",
    "i don't really care about the details, just", "as i said before,", "because everybody seems to like it,",
    "what i really want today is", "the last one was wrong, this time please draw",
    "*my uncle swears by this thing, anyway", "*after much back and forth we settled on",
    "*forgive my spelling, what we are after is", "*it took me ages to decide, but here goes:",
)  # fmt: skip
AFTER = (
    "because my niece really likes that sort of thing", "and it should look nice", "and please do it well this time",
    "so that everyone at work can see it", "which i have wanted for a long time", "but no rush",
    "and let me know when it is done", "since we have nothing like it yet", "i hope that makes sense",
    "it does not have to be perfect", "as that would really make my day", "and nothing else please",
    "because the last one was too boring", "you can decide the rest", "and i will pay you back someday",
    "*seeing as my cousin adores them", "*and do hurry, we are late already", "*that is all i ask of you really",
    "*else my colleague will never stop talking about it",
)  # fmt: skip
ADJECTIVES = (
    "fluffy", "majestic", "elegant", "shiny", "old", "brand new", "happy looking", "mysterious", "adorable", "epic",
    "realistic", "photorealistic", "dreamy", "magical", "friendly", "super cute", "lovely", "amazing", "perfect",
    "detailed", "cool looking", "fancy", "weird", "awesome", "gorgeous", "very pretty", "classic", "soft", "famous",
    "*whimsical", "*regal", "*dapper", "*rugged", "*exquisite", "*stunning",
)  # fmt: skip
WISHES = (
    "with lots of detail", "in the style of picasso", "with cinematic lighting", "shot on 35mm", "made of velvet",
    "looking very proud", "in slow motion", "with a friendly expression", "with realistic shadows", "at golden hour",
    "full of energy", "with a vintage vibe", "made of porcelain", "that everyone loves", "with volumetric light",
    "looking a bit lost", "in a cozy mood", "by greg rutkowski", "like in an old movie", "with lots of texture",
    "*carved out of marble", "*with dramatic backlighting", "*by a surrealist", "*that feels nostalgic",
    "*brimming with joy", "*photographed from below",
)  # fmt: skip
# Words as they are typed. Of a starred row, all are kept out of training.
SPOKEN: Mapping[str, Sequence[str]] = {
    "and": ("n", "&", "nd", "*an"), "with": ("w/", "wit", "w", "*wiv"), "background": ("bg", "backgrnd", "*bckgrd"),
    "picture": ("pic", "*pikture"), "please": ("pls", "plz"), "you": ("u",), "next to": ("nxt to", "*nex 2"),
    "in front of": ("infront of", "*b4"), "behind": ("behnd", "*bhind"),
    "to the left of": ("left of", "*2 the left of"),
    "to the right of": ("right of", "*2 the right of"), "at night": ("@ night", "nite", "*at nite"),
    "on the": ("on", "on da", "*onna"), "small": ("smol", "lil", "*teensy"), "large": ("big", "biig", "*ginormous"),
    "above": ("abv", "*ontop over"), "style": ("styl", "*stile"), "of": ("o", "of"), "two": ("2", "*2x"),
    "three": ("3", "*3x"), "four": ("4", "*4x"), "five": ("5", "*5x"), "emoji": ("emoj", "*emote"),
    "gradient": ("fade", "*ombre"), "stripes": ("stripy lines", "*stripeys"), "dots": ("dotties", "*dotz"),
}  # fmt: skip
COLOURS: Mapping[str, Sequence[str]] = {
    "red": ("reddish", "crimson", "*vermilion"), "orange": ("orangey", "*amber coloured"),
    "yellow": ("yellowish", "golden yellow", "*canary yellow"), "green": ("greenish", "grassy green", "*jade"),
    "blue": ("bluish", "cobalt", "*sapphire"), "purple": ("purplish", "lilac", "*plum"),
    "pink": ("pinkish", "hot pink", "*fuchsia"), "gray": ("grayish", "grey", "*slate"), "teal": ("cyan", "*aqua"),
    "navy": ("midnight blue", "*very dark blue"), "brown": ("brownish", "*mahogany"), "black": ("blackish", "*ebony"),
    "beige": ("sand coloured", "*ecru"), "mint": ("minty", "*pastel green"),
    "sky blue": ("pastel blue", "*powder blue"),
    "white": ("pure white", "*ivory"),
}  # fmt: skip
# What the image model knows nothing of: returned as it is.
FOREIGN = (
    "the theory of relativity", "a stapler", "quarterly revenue forecast", "a portrait of napoleon", "an iceberg lobby",
    "freedom and equality", "a blacksmith at work", "the smell of freshly cut hay", "a lawnmower", "marble columns",
    "a medieval alchemist's laboratory", "lord of the manor", "a drawbridge", "some kind of gearbox", "abstract grief",
    "the french revolution", "a vacuum cleaner", "a toaster", "a portrait of cleopatra", "my uncle kevin",
    "a trampoline",
    "democracy", "barbed wire", "a chainsaw", "a windmill", "a lighthouse", "a nutcracker collection", "a wardrobe",
    "a crowd of protesters", "a gondolier", "the colour of time", "an otoscope", "a sewing machine", "tectonic plates",
    "a hammock", "an igloo", "a scarecrow", "jazz", "a harpsichord", "philosophy", "a samurai duel", "a pulley",
    "ancient rome", "a zeppelin", "a knight in armour", "silence", "a wheelbarrow", "a xylophone", "mona lisa",
    "sherlock holmes", "a waterfall", "a glacier", "the taste of nostalgia", "a typewriter", "a bulldozer",
    "*a catapult", "*the great depression", "*a chandelier", "*beethoven's ninth", "*quantum entanglement",
    "*a forklift", "*a cello recital", "*a lawsuit", "*the renaissance", "*a gargoyle", "*an opera balcony",
    "*a hovercraft", "*a greenhouse", "*the roman senate", "*a cement mixer", "*a tapestry", "*mythology",
    "*a bagpiper", "*an aqueduct", "*a sundial", "*inflation", "*an ironing board", "*a didgeridoo", "*homesickness",
)  # fmt: skip
_NEIGHBOURS = {
    "a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo", "j": "hk",
    "k": "jl", "l": "k", "m": "n", "n": "bm", "o": "ip", "p": "o", "q": "wa", "r": "et", "s": "ad", "t": "ry",
    "u": "yi", "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "x",
}  # fmt: skip
_WORD = r"(?<![\w-]){}(?![\w-])"  # "two" is no part of "two-dimensional"
_SOUNDS = (("ph", "f"), ("ck", "k"), ("ee", "ea"), ("ea", "ee"), ("tion", "shun"), ("ou", "u"), ("c", "k"), ("y", "ie"))


def pick(rng: random.Random, phrases: Sequence[str], unseen: bool) -> str:
    """One of the phrases without a star, or with `unseen` one of those with it, if there are any."""
    starred = [phrase[1:] for phrase in phrases if phrase.startswith("*")]
    if unseen and starred:
        return rng.choice(starred)
    return rng.choice([phrase for phrase in phrases if not phrase.startswith("*")])


class Noises:
    """Every kind of noise, from one stream of random numbers.

    Args:
        words: no typo makes another one of these.
        unseen: starred phrases, and typos by sound instead of by finger.
    """

    def __init__(self, rng: random.Random, words: Collection[str], unseen: bool = False) -> None:
        self._rng, self._words, self._unseen = rng, words, unseen

    def typos(self, text: str) -> str:
        """One word in four misspelt, at least one of them if any is long enough; a word by one typo."""
        parts = re.split(r"([^\W\d_]+)", text)
        places = [i for i in range(1, len(parts), 2) if len(parts[i]) >= 4]
        for place in self._rng.sample(places, min(len(places), 1 + len(places) // 4)):
            parts[place] = self._misspelt(parts[place])
        return "".join(parts)

    def _misspelt(self, word: str) -> str:
        for _ in range(8):
            typo = self._by_sound(word) if self._unseen else self._by_finger(word)
            if typo != word and typo.casefold() not in self._words:
                return typo
        return word

    def _by_finger(self, word: str) -> str:
        """The first letter stays: people rarely miss it."""
        i = self._rng.randrange(1, len(word))
        match self._rng.randrange(4):
            case 0:
                return word[:i] + word[i + 1 :]
            case 1:
                return word[:i] + word[i] + word[i:]
            case 2:
                return word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :] if i > 1 else word
            case _:
                return word[:i] + self._rng.choice(_NEIGHBOURS.get(word[i], word[i])) + word[i + 1 :]

    def _by_sound(self, word: str) -> str:
        """As it sounds; where that changes nothing, a double letter made single or two vowels exchanged."""
        changed = [word[0] + word[1:].replace(old, new, 1) for old, new in _SOUNDS]
        changed.append(re.sub(r"(.)\1", r"\1", word, count=1))
        changed.append(re.sub(r"(?<=.)([aeiou])([^aeiou])([aeiou])", r"\3\2\1", word, count=1))
        changed = [typo for typo in changed if typo != word] or [self._by_finger(word)]
        return self._rng.choice(changed)

    def spoken(self, text: str) -> str:
        """Up to three words in text-speak, and colours loosely told."""
        table = {**SPOKEN, **COLOURS}
        present = [word for word in table if re.search(_WORD.format(word), text)]
        for word in self._rng.sample(present, min(len(present), 3)):
            text = re.sub(_WORD.format(word), pick(self._rng, table[word], self._unseen), text, count=1)
        return text

    def bare(self, text: str) -> str:
        """Without articles, or without punctuation."""
        if self._rng.random() < 0.7:
            text = re.sub(r"\b(a|an|the) ", "", text)
        return text.replace(",", "").replace(".", "") if self._rng.random() < 0.5 else text

    def clutter(self, text: str) -> str:
        """Asked for as of a person, or of another program."""
        which = self._rng.randrange(3)
        if which < 2:
            text = f"{self._of(OPENERS)} {text}"
        if which > 0:
            closer = self._of(CLOSERS)
            text = f"{text}{closer}" if closer[0] in ",.!?" else f"{text} {closer}"
        return text

    def rambling(self, text: str) -> str:
        """With an aside before it, after it, or both."""
        which = self._rng.randrange(3)
        text = f"{self._of(BEFORE)} {text}" if which < 2 else text
        return f"{text} {self._of(AFTER)}" if which > 0 else text

    def wishes(self, text: str, subject: str) -> str:
        """With one or two wishes that cannot be drawn; `subject` is as it stands in the text."""
        which = self._rng.randrange(3)
        if which < 2:
            text = text.replace(subject, f"{self._of(ADJECTIVES)} {subject}", 1)
            text = re.sub(r"\ban (?=[^aeiou])", "a ", re.sub(r"\ba (?=[aeiou])", "an ", text))
        if which > 0:
            text = f"{text}, {self._of(WISHES)}" if self._rng.random() < 0.5 else f"{text} {self._of(WISHES)}"
        return text

    def typed(self, text: str) -> str:
        """Capitals and spaces as they come."""
        chance = self._rng.random()
        if chance < 0.05:
            text = text.upper()
        elif chance < 0.3:
            text = text[:1].upper() + text[1:]
        return text.replace(" ", "  ", 1) if self._rng.random() < 0.04 else text

    def foreign(self) -> str:
        """A subject that the image model does not know."""
        return self._of(FOREIGN)

    def _of(self, phrases: Sequence[str]) -> str:
        return pick(self._rng, phrases, self._unseen)
