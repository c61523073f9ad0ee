"""A slow tree walk on Python lists, written from the definitions, and trees to try it on."""

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass
class Case:
    tokens: list  # per request: token of each node
    parents: list
    lens: list
    target: list  # per request: the target's token after each node
    steps: int
    nodes: int

    @property
    def batch(self):
        return len(self.lens)


def ancestors(parents, node):
    """The node itself and its ancestors, nearest first."""
    chain = [node]
    while parents[chain[-1]] >= 0:
        chain.append(parents[chain[-1]])
    return chain


def depth(parents, node):
    return len(ancestors(parents, node)) - 1


def children(parents, node):
    return [child for child, parent in enumerate(parents) if parent == node]


def walk(tokens, parents, target, steps):
    """The accepted path of one request, as node indices from the root on."""
    path = [0]
    while len(path) <= steps:
        hits = [child for child in children(parents, path[-1]) if tokens[child] == target[path[-1]]]
        if not hits:
            break
        path.append(hits[0])
    return path


@st.composite
def cases(draw, min_batch=0):
    """Random batches: few tokens, so that paths are accepted and siblings repeat; some padding."""
    batch = draw(st.integers(min_batch, 4))
    nodes = draw(st.integers(1, 12))
    token = st.integers(0, draw(st.sampled_from([0, 1, 2, 40])))

    def rows(element):
        return [[draw(element) for _ in range(nodes)] for _ in range(batch)]

    parents = []
    for _ in range(batch):
        row, real = [-1], [0]
        for node in range(1, nodes):
            row.append(draw(st.sampled_from([-1, *real])))
            if row[-1] >= 0:
                real.append(node)
        parents.append(row)
    deepest = max((depth(row, node) for row in parents for node in range(nodes)), default=0)
    return Case(
        tokens=rows(token),
        parents=parents,
        lens=[draw(st.sampled_from([0, 1, 7, 33])) for _ in range(batch)],
        target=rows(token),
        steps=deepest + draw(st.sampled_from([0, 0, 1, 5])),
        nodes=nodes,
    )
