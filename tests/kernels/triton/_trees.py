"""Random draft trees."""

import torch

from hwcore.kernels import build_tree


def random_parents(generator, bs, nodes):
    """Trees in which any node may be padding."""
    rows = torch.full((bs, nodes), -1)
    for request in range(bs):
        real = [0]
        for node in range(1, nodes):
            pick = int(torch.randint(-1, len(real), (), generator=generator))
            if pick >= 0:
                rows[request, node] = real[pick]
                real.append(node)
    return rows


def links_of(parents):
    lens = torch.zeros(parents.shape[0], dtype=torch.int64)
    return build_tree(parents, lens, max(0, parents.shape[1] - 1), 1, 0)[2:]


def random_trees(generator, bs, nodes, tokens):
    """What verification takes: few tokens, so that siblings repeat and paths are accepted."""
    parents = random_parents(generator, bs, nodes)
    drafted = torch.randint(0, tokens, (bs, nodes), generator=generator)
    return (drafted, parents, *links_of(parents))
