"""What the demo asks: from copying, where speculation shines, to inventing, where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

_HARBOUR = """The harbour of Port Ellen was built in 1821 and rebiult after the storm of 1902. \
Two ferries a day cross to the mainland, one in the morning and one in the evening. In winter the \
evening ferry is often canceled because of the wind. The old customs house is now a musuem, and \
the fish market next to it is open from Tuesday to Saturday. Most vistors come in May and June, \
when the days are long and the sea is calm. The school has forty pupils and three teechers. A new \
pier is planned for next year, but the council has not yet found the money for it."""

_MILL = """The old mill stands where two rivers meet. It was built in 1764 by Johann Weber, who \
came from the south with his wife and six children. For a hundred years it ground the corn of \
eleven villages. Then the railway came, and flour from the city was cheaper. The last miller, Karl \
Weber, closed the mill in 1912 and went to sea. The wheel is gone, but the three millstones lie in \
the grass behind the house. Since 2003 the mill belongs to a club of forty members, who repair the \
roof, paint the windows and bake bread on the first Sunday of every month. Visitors pay two euros, \
and children pay nothing."""

_CODE = """def summarize(data, limit):
    total = 0
    count = 0
    for x in data:
        if x is None:
            continue
        if x > limit:
            x = limit
        total = total + x
        count = count + 1
    if count == 0:
        return None
    average = total / count
    largest = max(x for x in data if x is not None)
    smallest = min(x for x in data if x is not None)
    return {"total": total, "average": average, "largest": largest, "smallest": smallest}
"""

_PEOPLE = """Anna Keller, born 1971 in Bern, is a surgeon. Tomas Novak, born 1985 in Brno, is a \
violinist. Mary Ochieng, born 1990 in Kisumu, is an engineer. Luis Romero, born 1968 in Quito, is \
a baker. Ingrid Dahl, born 1979 in Bergen, is a pilot. Kenji Sato, born 1994 in Osaka, is a \
gardener. Fatima Haddad, born 1982 in Amman, is a judge. Paul Martin, born \
1988 in Lyon, is a cook. Elena Rossi, born 1976 in Turin, is a painter."""


@dataclass(frozen=True)
class Prompt:
    """A kind of task, and the user's message."""

    name: str
    text: str


PROMPTS = (
    Prompt("edit", f"Fix the typos in this text.\n\n{_HARBOUR}"),
    Prompt("repeat", f"Repeat this text word for word.\n\n{_MILL}"),
    Prompt(
        "rename",
        f"```python\n{_CODE}```\n\nRewrite this code with the variable name x replaced by value. "
        "Write only the code.",
    ),
    Prompt(
        "extract",
        "Copy the name, year of birth, city and job of each person from this text into a numbered "
        f"list.\n\n{_PEOPLE}",
    ),
    Prompt("story", "Write a short story about a lighthouse keeper who finds a strange bottle."),
    Prompt("question", "Why is the sky blue, and why is it red in the evening? Explain."),
)

SERVED = (
    Prompt("mill", f"Repeat this text word for word.\n\n{_MILL.partition(' For a ')[0]}"),
    Prompt("capital", "What is the capital of France? Answer in one sentence."),
    Prompt("harbour", f"Fix the typos in this text.\n\n{_HARBOUR.partition(', one ')[0]}."),
    Prompt("haiku", "Write a haiku about the sea."),
    Prompt("people", f"Copy this text.\n\n{_PEOPLE.partition(' Luis ')[0]}"),
    Prompt("moon", "Why does the moon have phases?"),
    Prompt("spell", "Correct the spelling: The visters came to the musuem on a rainy Tusday."),
    Prompt("bread", "How do I bake a simple bread? Give short steps."),
    Prompt(
        "code",
        f"Rewrite this code with x replaced by value.\n\n{_CODE.partition('    if count')[0]}",
    ),
    Prompt("list", "Copy this list and number it: apples, pears, plums, cherries, grapes."),
)
"""What comes in one after the other: short, so that many run side by side."""


def as_chat(text: str) -> str:
    """Return a user's message, and the opening of the answer, as the model was tuned to read it."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
