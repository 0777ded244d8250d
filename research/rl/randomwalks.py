"""Shortest paths on a random graph (Decision Transformer, arXiv 2106.01345, section 5; the form of CarperAI's trlx).

21 nodes, named a to u; each directed edge exists with chance 0.1 and every node has one. A walk starts anywhere but at
the goal a and has at most 10 nodes. Optimality of a walk with n nodes is (10 - n) / (10 - shortest), so 1 for a
shortest path and 0 for one that takes a wrong edge or does not arrive; the policy learns from 1000 random walks.
"""

from dataclasses import dataclass

import numpy as np

NODES, LONGEST, GOAL = 21, 10, 0
NAMES = "abcdefghijklmnopqrstu"


@dataclass(frozen=True)
class Graph:
    """edges bool [N, N]; shortest [N]: nodes on the shortest path to the goal, at most 10; walks: the samples."""

    edges: np.ndarray
    shortest: np.ndarray
    walks: tuple[str, ...]


def build(seed: int = 1000, walks: int = 1000) -> Graph:
    """The legacy generator of NumPy, whose stream is frozen, so that the seed names one graph for ever."""
    rng = np.random.RandomState(seed)
    while True:
        edges = rng.rand(NODES, NODES) > 0.9
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            break
    edges[GOAL] = False
    edges[GOAL, GOAL] = True
    return Graph(edges, _shortest(edges), tuple(_walk(rng, edges) for _ in range(walks)))


def _walk(rng: np.random.RandomState, edges: np.ndarray) -> str:
    while (node := rng.randint(NODES)) == GOAL:
        pass
    walk = [node]
    while len(walk) < LONGEST and walk[-1] != GOAL:
        walk.append(rng.choice(np.flatnonzero(edges[walk[-1]])))
    return "".join(NAMES[i] for i in walk)


def _shortest(edges: np.ndarray) -> np.ndarray:
    """Breadth first, from the goal backwards."""
    nodes, reached = np.full(NODES, LONGEST), np.arange(NODES) == GOAL
    nodes[GOAL] = 1
    for count in range(2, LONGEST + 1):
        new = (edges @ reached) & ~reached
        nodes[new] = count
        reached = reached | new
    return nodes


def optimality(graph: Graph, walk: str) -> float:
    """In 0 to 1. `walk` begins with a start node; what follows the goal does not count. A walk from a bad start gives
    0.
    """
    if not walk or walk[0] not in NAMES[1:]:
        return 0.0
    path = walk[:LONGEST].partition(NAMES[GOAL])
    if not path[1]:
        return 0.0
    nodes = [NAMES.find(c) for c in path[0] + path[1]]
    if -1 in nodes or not all(graph.edges[a, b] for a, b in zip(nodes, nodes[1:], strict=False)):
        return 0.0
    return float((LONGEST - len(nodes)) / max(LONGEST - graph.shortest[nodes[0]], 1))


def shortest_path(graph: Graph, start: str) -> str:
    """One of them."""
    walk = [NAMES.index(start)]
    while walk[-1] != GOAL:
        follows = np.flatnonzero(graph.edges[walk[-1]])
        walk.append(follows[np.argmin(graph.shortest[follows])])
    return "".join(NAMES[i] for i in walk)


def expected(graph: Graph, table: np.ndarray) -> float:
    """Optimality of a policy in the mean over the 20 starts, exactly. table [N, N]: chance of the next node."""
    total = 0.0
    for start in range(1, NODES):
        at = np.eye(NODES)[start]
        for count in range(2, LONGEST + 1):
            at = at @ (table * graph.edges)
            total += at[GOAL] * (LONGEST - count) / max(LONGEST - graph.shortest[start], 1)
            at[GOAL] = 0.0
    return float(total / (NODES - 1))


def imitation(graph: Graph) -> np.ndarray:
    """[N, N]: how often each node follows each in the walks, the best any model of single steps does by imitation."""
    counts = np.zeros((NODES, NODES))
    for walk in graph.walks:
        nodes = [NAMES.index(c) for c in walk]
        np.add.at(counts, (nodes[:-1], nodes[1:]), 1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
