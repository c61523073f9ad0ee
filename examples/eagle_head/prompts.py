"""What the model is asked: templates and topics for training, and prompts held out from it."""

from __future__ import annotations

import functools
import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A kind of task, how far it is from the training data, and the user's message."""

    task: str
    group: str
    text: str


@functools.cache
def _parts() -> dict[str, Any]:
    with Path(__file__).with_name("prompts.toml").open("rb") as file:
        return tomllib.load(file)


def topics() -> list[str]:
    """Return the topics of the training prompts."""
    return list(_parts()["topics"])


@functools.cache
def templates() -> list[tuple[str, str]]:
    """Return all training templates, each with its kind of task."""
    by_task: dict[str, list[str]] = _parts()["templates"]
    return [(task, template) for task, found in by_task.items() for template in found]


def trained(index: int) -> Asked:
    """Return training prompt ``index`` of an endless list.

    Every stretch of it holds all templates equally often.
    """
    every = templates()
    lap, at = divmod(index, len(every))
    order = random.Random(f"order {lap}").sample(range(len(every)), len(every))
    task, template = every[order[at]]
    return Asked(task, "train", _fill(template, topics(), random.Random(f"fill {index}")))


def starter(index: int) -> str:
    """Return how the message of conversation ``index`` begins that the model makes up."""
    return random.Random(f"starter {index}").choice(list[str](_parts()["starters"]))


def follow_up(index: int) -> str:
    """Return what the user says next in the conversation that training prompt ``index`` begins."""
    chance = random.Random(f"follow {index}")
    return _fill(chance.choice(_parts()["follow_ups"]), topics(), chance)


@functools.cache
def held_out() -> tuple[Asked, ...]:
    """Return the prompts for evaluation: unseen topics, unseen tasks, and unlike the data."""
    unseen, seen = _parts()["held_topics"], topics()
    tasks, found = list(_parts()["templates"]), []
    for index in range(20):
        chance = random.Random(f"held {index}")
        task = tasks[index % len(tasks)]
        of_task = [template for kind, template in templates() if kind == task]
        usable = [template for template in of_task if "{topic}" in template]
        chosen = chance.choice(usable or of_task)
        found.append(Asked(task, "topic", _fill(chosen, [unseen[index]], chance)))
    for index, (task, template) in enumerate(_parts()["held_templates"].items()):
        chance = random.Random(f"held task {index}")
        text = _fill(template, seen if index % 2 else unseen, chance)
        found.append(Asked(task, "task", text))
    return (*found, *(Asked("free", "free", text) for text in _parts()["held_free"]))


def resembles_held_out(text: str) -> bool:
    """Return whether a prompt is a held-out one, or shares most of its word triples with one.

    Training prompts share their templates with the held-out ones of group `topic`: they count as
    alike only when they name the topic as well.
    """
    words = _words(text)
    if tuple(words) in _held_texts():
        return True
    triples = _triples(words)
    return any(
        needed <= set(words) and len(triples & held) >= 0.6 * min(len(triples), len(held))
        for held, needed in _held_triples()
        if triples and held
    )


@functools.cache
def _held_texts() -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(_words(asked.text)) for asked in held_out())


@functools.cache
def _held_triples() -> list[tuple[frozenset[tuple[str, ...]], set[str]]]:
    unseen = _parts()["held_topics"]
    found = []
    for index, asked in enumerate(held_out()):
        needed = _words(unseen[index]) if asked.group == "topic" else []
        found.append((_triples(_words(asked.text)), set(needed)))
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _triples(words: list[str]) -> frozenset[tuple[str, ...]]:
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _fill(template: str, about: list[str], chance: random.Random) -> str:
    """Fill the blanks of a template; texts about the topic are made of sentences of their own."""
    topic = chance.choice(about)
    other = chance.choice([one for one in topics() if one != topic])
    name, name2 = chance.sample(_parts()["names"], 2)
    blanks: dict[str, object] = {
        "topic": topic,
        "topic2": other,
        "name": name,
        "name2": name2,
        "city": chance.choice(_parts()["cities"]),
        "n": chance.randint(3, 9),
        "a": chance.randint(11, 98),
        "b": chance.randint(11, 98),
    }
    sentences = chance.sample(_parts()["sentences"], chance.randint(3, 6))
    passage = " ".join(_capital(sentence.format(**blanks)) for sentence in sentences)
    wrong = passage
    for right, mistake in chance.sample(_parts()["mistakes"], 6):
        wrong = wrong.replace(right, mistake, 1)
    return template.format(**blanks, passage=passage, wrong=wrong)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
