"""What must be true of a radix tree at any time, whoever uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from cache.prefix.pages import PagePool
from cache.prefix.radix import Node, RadixTree


def nodes(tree: RadixTree) -> Iterator[Node]:
    """All of them, parents first."""
    stack = list(tree.roots.values())
    while stack:
        node = stack.pop()
        yield node
        stack += node.children.values()


def check_tree(tree: RadixTree, pool: PagePool, locked: Iterable[Node] = (), held: Iterable[int] = ()) -> None:
    """Shape, locks and reference counts are exact.

    locked: nodes that are locked, one a lock. held: pages that others hold, one a reference.
    """
    locks: Counter[Node] = Counter()
    for node in locked:
        at: Node | None = node
        while at is not None:
            locks[at] += 1
            at = at.parent
    references = Counter(held)
    evictable = 0
    for node in nodes(tree):
        references.update(node.pages)
        assert node.locks == locks[node]
        evictable += 0 if node.locks else len(node.pages)
        if node.parent is None:
            assert tree.roots[node.salt] is node
            assert node.children, "an empty root is forgotten"
            assert (node.tokens, node.start, node.pages) == ((), 0, [])
        else:
            assert node.tokens
            assert node.parent.children[node.tokens[0]] is node
            assert node.start == node.parent.end
            assert node.salt == node.parent.salt
            assert len(node.pages) == pool.covering(node.end) - node.start // pool.page_size
    assert tree.evictable == evictable
    assert [pool.references(page) for page in range(pool.pages)] == [references[page] for page in range(pool.pages)]
    assert pool.free == pool.pages - len(references)
