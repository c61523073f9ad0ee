"""The head's data: what is asked, how conversations are had, and that none is lost or repeated."""

import contextlib

import torch

from examples.eagle_head import prompts, store
from examples.eagle_head.conversation import END, Conversation, Plan
from examples.eagle_head.generate import Writer, as_document, conversations, converse

WIDTH = 6


class Words:
    """A tokenizer: a token is a word, and token ids tell it."""

    def __init__(self):
        self._ids = {"<|im_end|>": END}

    def encode(self, text):
        words = text.replace("<|im_end|>", " <|im_end|> ").split()
        return [self._ids.setdefault(word, 100 + len(self._ids)) for word in words]

    def decode(self, ids):
        names = {token: word for word, token in self._ids.items()}
        return " ".join(names.get(token, f"w{token}") for token in ids)


def model(tokens, positions, temperature, uniform):
    """Draw words anew each time, and end a turn now and then; a state tells where it is from."""
    following = torch.where(uniform < 0.1, END, 100 + (uniform * 1e4).long())
    states = torch.stack((tokens, positions), dim=1).repeat(1, WIDTH // 2)
    return following, states.bfloat16()


def have(writer, steps, bs=4):
    """Have conversations for so many steps."""
    pending = conversations(Words(), writer.taken, writer.known)
    for one in converse(model, pending, bs, writer.generator):
        if one is not None:
            writer.add(one)
            continue
        steps -= 1
        if not steps:
            return


def new_writer(place):
    return Writer(place, torch.Generator(), every_s=0.0)


def test_held_out_prompts_are_many_and_of_three_groups():
    groups = [asked.group for asked in prompts.held_out()]

    assert len(groups) >= 54
    assert min(groups.count(group) for group in ("topic", "task", "free")) >= 18


def test_no_training_prompt_resembles_a_held_out_one():
    asked = [prompts.trained(index).text for index in range(3000)]

    assert not [text for text in asked if prompts.resembles_held_out(text)]


def test_near_duplicates_of_held_out_prompts_are_recognised():
    free = prompts.held_out()[-1].text
    topic = prompts.held_out()[1].text

    assert prompts.resembles_held_out(free)
    assert prompts.resembles_held_out(free.upper() + "!!")
    assert prompts.resembles_held_out("Well then. " + free)
    assert prompts.resembles_held_out(topic)
    assert not prompts.resembles_held_out(topic.replace("lighthouses", "bridges"))


def test_templates_cover_many_tasks_and_each_is_used():
    every = prompts.templates()
    tasks = [prompts.trained(index).task for index in range(len(every))]

    assert len({task for task, _ in every}) >= 14
    assert len(every) >= 60
    assert sorted(tasks) == sorted(task for task, _ in every)


def test_a_message_of_the_models_own_is_given_as_no_answer():
    index = next(i for i in range(1, 99, 2) if Plan.of(i).turns == 1)
    one = Conversation(Plan.of(index), Words())
    for token in (101, 102, 103, END, 104, 105, END):
        one.append(token)

    assert one.done
    assert [t for t, is_answer in zip(one.tokens, one.answer, strict=True) if is_answer] == [
        104,
        105,
        END,
    ]


def test_a_message_that_is_held_out_is_dropped():
    words = Words()
    one = Conversation(Plan.of(1), words)
    said = words.encode(prompts.starter(1))
    del one.tokens[-len(said) :], one.answer[-len(said) :]
    one._began = len(one.tokens)
    for token in [*words.encode(prompts.held_out()[-1].text), END]:
        one.append(token)

    assert one.dropped


def test_states_belong_to_the_tokens_they_are_stored_with(tmp_path):
    writer = new_writer(tmp_path)
    have(writer, 300)
    writer.write()

    documents, _ = store.read(store.shards(tmp_path))

    assert len(documents) > 8
    for one in documents:
        positions = torch.arange(len(one.tokens) - 1)
        assert one.states[:, 0].equal(one.tokens[:-1].bfloat16())
        assert one.states[:, 1].equal(positions.bfloat16())


def test_generation_goes_on_where_it_was_killed(tmp_path):
    writer = new_writer(tmp_path)
    have(writer, 200)
    writer.write()
    have(writer, 200)  # killed before these are written
    again = new_writer(tmp_path)
    have(again, 400)
    again.write()

    documents, dropped = store.read(store.shards(tmp_path))
    indices = [one.index for one in documents] + dropped

    assert len(indices) == len(set(indices))
    # What is missing was being had in one of the four rows when the run ended.
    missing = set(range(max(indices))) - set(indices)
    assert len(missing) < 4


def test_a_repeated_message_is_kept_once(tmp_path):
    writer = new_writer(tmp_path)
    one = Conversation(Plan.of(1), Words())
    for token in (101, 102, 103, END, 104, END):
        one.append(token)
    one.states = torch.zeros(len(one.tokens) - 1, WIDTH, dtype=torch.bfloat16)

    writer.add(one)
    writer.add(one)
    writer.write()

    documents, dropped = store.read(store.shards(tmp_path))
    assert [document.index for document in documents] == [1]
    assert dropped == [1]


def test_a_shard_is_complete_as_soon_as_it_is_there(tmp_path, monkeypatch):
    writer = new_writer(tmp_path)
    have(writer, 100)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with contextlib.suppress(KeyboardInterrupt):
        writer.write()

    assert store.shards(tmp_path) == []


def test_both_kinds_of_conversation_and_of_sampling_are_equally_frequent():
    plans = [Plan.of(index) for index in range(840)]

    for own in (True, False):
        of_kind = [plan for plan in plans if plan.own_message == own]
        assert sum(plan.temperature == 0 for plan in of_kind) == len(of_kind) // 2 == 210
        for greedy in (True, False):
            drawn = [plan for plan in of_kind if (plan.temperature == 0) == greedy]
            assert any(plan.turns == 2 for plan in drawn)
            assert any(plan.longest_answer > 192 for plan in drawn)


def test_a_document_keeps_what_was_said_first():
    one = Conversation(Plan.of(0), Words())
    one.states = torch.zeros(1, WIDTH)

    assert as_document(one).message == prompts.trained(0).text
