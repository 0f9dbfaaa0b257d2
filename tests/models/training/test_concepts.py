"""The concept table: enough concepts, one meaning a word, something to draw for each."""

from collections import Counter

from models.training.concepts import STYLES, TINTS, load_concepts, select

CONCEPTS = load_concepts()


def test_enough_concepts_with_enough_drawings() -> None:
    assert len(CONCEPTS) >= 1200
    for concept in CONCEPTS:
        assert len(concept.drawings) == len(STYLES)
        assert sum(bool(own) for own in concept.drawings) >= 2, concept.name
    assert sum(len(own) > 1 for concept in CONCEPTS for own in concept.drawings) >= 400


def test_a_word_means_one_concept() -> None:
    """Neither a name, a synonym nor a plural is shared, and no word begins with a tint that a caption could mean."""
    words = Counter(word for concept in CONCEPTS for word in {*concept.words, concept.plural})
    assert [word for word, uses in words.items() if uses > 1] == []
    tinted = {f"{tint} {word}" for concept in CONCEPTS if concept.tintable for word in concept.words for tint in TINTS}
    assert sorted(tinted & set(words)) == []


def test_a_drawing_shows_one_concept() -> None:
    for style in range(len(STYLES)):
        icons = Counter(icon for concept in CONCEPTS for icon in concept.drawings[style])
        assert [icon for icon, uses in icons.items() if uses > 1] == []


def test_words_are_plain() -> None:
    for concept in CONCEPTS:
        for word in (*concept.words, concept.plural):
            assert word == " ".join(word.lower().split())
            assert len(word) <= 32, word


def test_traits_and_overrides() -> None:
    """Spot checks of what the table's notation says, one of each kind."""
    cat, phoenix, clock, cook = (select((name,))[0] for name in ("cat", "phoenix", "clock", "cook"))
    assert cat.tintable
    assert cat.flips
    assert "kitten" in cat.words
    assert cat.plural == "cats"
    assert phoenix.drawings == (("phoenix-bird",), ("phoenix-bird",), ("phoenix",), ("phoenix",))
    assert not clock.flips
    assert len(cook.drawings[0]) == 3
    assert not cook.tintable


def test_select_keeps_the_table_s_order() -> None:
    assert [concept.name for concept in select(("dog", "cat"))] == sorted(
        ("dog", "cat"), key=[concept.name for concept in CONCEPTS].index
    )
    assert select(None) == CONCEPTS
