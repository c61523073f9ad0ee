"""What is asked of each race: a wrong value where streams run late, a report wherever it runs."""

from __future__ import annotations

import contextlib
import inspect
import re

import pytest

from hwcore.testing.sanitizer import Sanitizer


class Race:
    """A program with a race and, with ``fixed=True``, without it.

    Its source marks the lines of both accesses: ``# first``, ``# second``, numbered if several.
    """

    def __init__(self, hw, program):
        self.hw = hw
        self.program = program

    def value(self, fixed, policy="lazy"):
        """Run the program without the sanitizer; only the simulated device has drain policies."""
        with self._draining(policy):
            return self.program(self.hw, fixed)

    def reports(self, fixed, policy="lazy"):
        """Run the program under the sanitizer and return what it reports."""
        with self._draining(policy), Sanitizer(self.hw, on_race="collect") as sanitizer:
            self.program(self.hw, fixed)
        return sanitizer.races

    def lines(self, mark):
        """Return `file:line in function` of the lines with a mark, in the order of its numbers."""
        source, start = inspect.getsourcelines(self.program)
        found = {}
        for number, text in enumerate(source, start):
            if match := re.search(rf"# {mark}( \d)?", text):
                found[match.group(1) or ""] = number
        file, name = inspect.getsourcefile(self.program), self.program.__name__
        return [(file, f":{found[key]} in {name}") for key in sorted(found)]

    @property
    def is_late(self):
        """Whether work is run late enough here for the race to give a wrong value."""
        return self.hw.info.name == "sim"

    def _draining(self, policy):
        if not self.is_late:
            return contextlib.nullcontext()
        from hwcore_sim import device

        return device.drain_policy(policy)


class Checks:
    """The tests of every race. A module states `program`, RIGHT, WRONG, KIND and EDGES."""

    def test_it_gives_a_wrong_value_where_streams_run_late(self, race, expected):
        assert race.value(fixed=False) == (expected.WRONG if race.is_late else expected.RIGHT)

    def test_it_is_right_by_luck_where_streams_run_at_once(self, race, expected):
        assert race.value(fixed=False, policy="eager") == expected.RIGHT

    @pytest.mark.parametrize("policy", ["lazy", "eager", "random:1", "random:2", "random:3"])
    def test_fixed_it_is_right_in_any_order(self, race, expected, policy):
        assert race.value(fixed=True, policy=policy) == expected.RIGHT

    @pytest.mark.parametrize("policy", ["lazy", "eager"])
    def test_it_is_reported_with_both_sites_whatever_came_out(self, race, expected, policy):
        found = race.reports(fixed=False, policy=policy)
        assert [report.kind for report in found] == [expected.KIND] * len(expected.EDGES)
        for number, report in enumerate(found):
            for access, mark in ((report.previous, "first"), (report.current, "second")):
                file, ending = race.lines(mark)[number]
                assert access.stack[0].endswith(ending), report
                assert access.stack[0].removesuffix(ending) in file
            assert report.missing_edge.startswith(expected.EDGES[number]), report

    @pytest.mark.parametrize("policy", ["lazy", "eager"])
    def test_fixed_it_is_not_reported(self, race, expected, policy):
        assert race.reports(fixed=True, policy=policy) == []
