"""What prompt lookup drafts, as its definition says."""

from examples.serving.drafting import BatchLookup


def continuation(text, width):
    """The draft as its definition says, one text at a time."""
    best = (0, 0)
    for place in range(1, len(text)):
        agreement = 0
        while agreement < min(BatchLookup.longest, place) and (
            text[place - 1 - agreement] == text[len(text) - 1 - agreement]
        ):
            agreement += 1
        best = max(best, (agreement, place))
    follows = text[best[1] :][: width - 1] if best[0] else []
    return [text[-1], *follows]
