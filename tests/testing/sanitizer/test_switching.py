"""On, off, and what happens at a race."""

from __future__ import annotations

import gc
import os
import pickle
import re
import threading
import warnings

import pytest
import torch

import hwcore
from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.testing.sanitizer import RaceError, RaceWarning, Sanitizer, SanitizerError

# A program with one race, for any backend; `hw` is there.
PROGRAM = """
import torch
x = torch.zeros(8, device=hw.device())
side = hw.create_stream()
with hw.stream_context(side):
    y = x + 1
hw.synchronize()
"""


def race(hw):
    exec(PROGRAM, {"hw": hw})


def process(site, setting, code, **variables):
    lines = ["import hwcore", "hw = hwcore.use('cpu')", code]
    return site.run("\n".join(lines), HWCORE_SANITIZE=setting, **variables)


# --- A block ---


def test_a_race_is_raised_at_the_second_access(hw):
    reached = []
    with pytest.raises(RaceError) as caught, Sanitizer(hw) as sanitizer:
        exec(PROGRAM.replace("hw.synchronize()", "reached.append(1)"), {"hw": hw, "r": reached})
    assert reached == []
    assert sanitizer.races == [caught.value.race]
    assert str(caught.value) == str(caught.value.race)
    assert issubclass(RaceError, hwcore.HwcoreError)
    assert issubclass(RaceError, RuntimeError)
    hw.synchronize()


def test_a_race_is_warned_of(hw):
    with pytest.warns(RaceWarning, match="race: read after write"), Sanitizer(hw, on_race="warn"):
        race(hw)


def test_a_warning_is_of_the_programs_line_and_module(hw):
    with warnings.catch_warnings(record=True) as caught, Sanitizer(hw, on_race="warn"):
        warnings.simplefilter("always")
        x = torch.zeros(8, device=hw.device())
        with hw.stream_context(hw.create_stream()):
            y = x + 1
    hw.synchronize()
    del y
    (warning,) = caught
    text = str(warning.message)
    assert warning.filename == __file__
    assert f"{os.path.basename(__file__)}:{warning.lineno} in test_a_warning_is_of" in text


def test_a_filter_may_name_the_programs_module(hw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=RaceWarning, module=re.escape(__name__))
        with Sanitizer(hw, on_race="warn") as sanitizer:
            x = torch.zeros(8, device=hw.device())
            with hw.stream_context(hw.create_stream()):
                y = x + 1
    assert len(sanitizer.races) == 1
    hw.synchronize()
    del y


def test_a_race_is_collected(hw):
    with Sanitizer(hw, on_race="collect") as sanitizer:
        race(hw)
    assert [found.kind for found in sanitizer.races] == ["read after write"]


def test_each_pair_of_lines_is_reported_once(hw):
    with Sanitizer(hw, on_race="collect") as sanitizer:
        x = torch.zeros(8, device=hw.device())
        side = hw.create_stream()
        for _ in range(10):
            x.add_(1)
            with hw.stream_context(side):
                x + 1
            hw.synchronize()
        with hw.stream_context(side):
            x.add_(1)
        x.add_(1)
    assert [found.kind for found in sanitizer.races] == ["read after write", "write after write"]
    hw.synchronize()


def test_taking_races_forgets_them(hw):
    with Sanitizer(hw, on_race="collect") as sanitizer:
        race(hw)
        assert len(sanitizer.take()) == 1
        assert sanitizer.take() == []
    assert sanitizer.races == []


def test_an_error_crosses_pickle(hw):
    with Sanitizer(hw, on_race="collect") as sanitizer:
        race(hw)
    copied = pickle.loads(pickle.dumps(RaceError(sanitizer.races[0])))
    assert str(copied) == str(sanitizer.races[0])


def test_leaving_puts_everything_back(hw):
    def state():
        return (
            hw.hook_sources(),
            threading.Thread.start,
            torch.Tensor.tolist,
            torch.Tensor.numpy,
            torch.Tensor.cpu,
            "cpu" in vars(torch.Tensor),
            torch._C._len_torch_dispatch_stack(),
        )

    before = state()
    with Sanitizer(hw):
        assert state() != before
    assert state() == before
    with pytest.raises(KeyError), Sanitizer(hw):
        raise KeyError
    assert state() == before


def test_leaving_puts_another_tools_function_back(hw, monkeypatch):
    def tolist(tensor):
        return "theirs"

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with Sanitizer(hw):
        assert torch.zeros(1).tolist() == "theirs"
    assert torch.Tensor.tolist is tolist


def test_a_function_that_another_tool_replaced_meanwhile_stays(hw, monkeypatch):
    with Sanitizer(hw):
        ours = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: ("theirs", ours(tensor)))
    assert torch.zeros(1).tolist() == ("theirs", [0])
    monkeypatch.undo()
    del torch.Tensor.tolist


def test_the_programs_own_error_is_the_one_to_see(hw):
    def leave_a_race_behind():
        x = torch.ones(8, device=hw.device())
        side = hw.create_stream()
        hw.wait_stream(side, hw.current_stream())
        with hw.stream_context(side):
            return x + 1

    sanitizer = Sanitizer(hw)

    def program():
        with sanitizer:
            leave_a_race_behind()
            raise KeyError

    with pytest.raises(KeyError):
        program()
    assert [race.kind for race in sanitizer.races] == ["freed while in use"]
    hw.synchronize()


def test_a_sanitizer_may_be_entered_again(hw):
    sanitizer = Sanitizer(hw, on_race="collect")
    for expected in (1, 2):
        with sanitizer:
            race(hw)
        assert len(sanitizer.races) == expected


def test_a_second_sanitizer_is_refused_and_the_first_goes_on(hw):
    with Sanitizer(hw, on_race="collect") as first:
        with pytest.raises(SanitizerError, match="expected none to be on"), Sanitizer(hw):
            pass
        race(hw)
        assert len(first.races) == 1
    with Sanitizer(hw):
        pass


def test_what_it_does_at_a_race_is_one_of_three():
    with pytest.raises(ArgumentValueError, match="`on_race` got 'explode'"):
        Sanitizer(on_race="explode")


def test_a_sanitizer_that_is_off_names_nothing(hw):
    with pytest.raises(SanitizerError, match="used while off"):
        Sanitizer(hw).name(hw.current_stream(), "main")


@pytest.mark.parametrize(
    ("stream", "name", "part"),
    [
        (3, "a", "name: `stream` got 3 (int); expected a stream"),
        (None, "a", "expected a stream"),
        (..., 3, "name: `name` got 3 (int); expected a str"),
    ],
)
def test_a_name_that_makes_no_sense(hw, stream, name, part):
    with Sanitizer(hw) as sanitizer, pytest.raises(ArgumentTypeError) as caught:
        sanitizer.name(hw.current_stream() if stream is ... else stream, name)
    assert part in str(caught.value)


def test_nothing_is_left_of_a_sanitizer(hw):
    import weakref

    with Sanitizer(hw, on_race="collect") as sanitizer:
        race(hw)
    tracker = weakref.ref(sanitizer._tracker)
    del sanitizer
    gc.collect()
    assert tracker() is None


def test_the_default_is_the_processs_backend(hw):
    with pytest.raises(RaceError), Sanitizer():
        race(hwcore.current_backend())
    hw.synchronize()


def test_warnings_as_errors_do_not_leave_the_lock_held(hw):
    sanitizer = Sanitizer(hw, on_race="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RaceWarning), sanitizer:
            race(hw)
    free = []

    def look():
        free.append(sanitizer._tracker.lock.acquire(timeout=5))
        sanitizer._tracker.lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(10)
    assert free == [True]
    hw.synchronize()


# --- A whole process ---


@pytest.mark.parametrize("setting", ["1", "raise", "on", "TRUE"])
def test_the_variable_switches_it_on(site, setting):
    done = process(site, setting, PROGRAM)
    assert done.returncode == 1
    assert "hwcore.testing.sanitizer.reports.RaceError: race: read after write" in done.stderr


def test_the_variable_can_ask_for_warnings(site):
    done = process(site, "warn", PROGRAM + "print('end')")
    assert (done.returncode, done.stdout) == (0, "end\n")
    assert "RaceWarning: race: read after write" in done.stderr


def test_the_variable_can_ask_for_a_summary_at_the_end(site):
    done = process(site, "collect", PROGRAM + "print('end')")
    assert (done.returncode, done.stdout) == (0, "end\n")
    assert done.stderr.startswith("hwcore race sanitizer: 1 race\nrace: read after write\n")
    assert process(site, "collect", "").stderr == "hwcore race sanitizer: no races\n"


def test_what_was_freed_last_is_told_at_the_end(site):
    code = PROGRAM.replace("hw.synchronize()", "").replace(
        "with hw", "hw.wait_stream(side, hw.current_stream())\nwith hw"
    )
    done = process(site, "raise", code + "del x")
    assert done.returncode == 0
    assert done.stderr.startswith("hwcore race sanitizer: 1 race\nrace: freed while in use\n")


def test_every_thread_is_watched(site):
    code = f"""
        import threading
        thread = threading.Thread(target=lambda: exec({PROGRAM!r}, dict(hw=hw)))
        thread.start()
        thread.join()
    """
    import textwrap

    done = process(site, "collect", textwrap.dedent(code))
    assert "1 race\n" in done.stderr


@pytest.mark.parametrize("setting", [None, "", "0", "off", "False"])
def test_off_costs_nothing(site, setting):
    variables = {} if setting is None else {"HWCORE_SANITIZE": setting}
    code = """
        import sys, threading, hwcore, torch
        start, tolist = threading.Thread.start, torch.Tensor.tolist
        hw = hwcore.use("cpu")
        print([name for name in sys.modules if name.startswith("hwcore.testing")])
        print(threading.Thread.start is start, torch.Tensor.tolist is tolist)
        print(any("wrapped" in source for source in hw.hook_sources().values()))
    """
    assert site.run(code, **variables).output == ["[]", "True True", "False"]


def test_a_misspelt_setting_is_an_error(site):
    done = process(site, "rais", "")
    done.raised(
        ArgumentValueError,
        ValueError,
        "hwcore: the variable HWCORE_SANITIZE got 'rais' (str); expected 1, raise, warn, collect",
    )


def test_a_process_that_is_watched_takes_no_second_sanitizer(site):
    code = "from hwcore.testing.sanitizer import Sanitizer\nwith Sanitizer(hw): pass"
    done = process(site, "collect", code)
    assert "SanitizerError" in done.stderr
    assert "unset HWCORE_SANITIZE" in done.stderr


def test_another_backend_of_the_process_is_said_not_to_be_watched(site):
    site.add("acme")
    done = process(site, "collect", "hwcore.load_backend('acme')")
    assert done.returncode == 0
    assert "watches one backend" in done.stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_are_watched_for_themselves(site, method):
    (site.folder / "child.py").write_text(
        "import hwcore\ndef main():\n    hw = hwcore.use('cpu')\n"
        f"    try:\n        exec({PROGRAM!r}, dict(hw=hw))\n"
        "    except RuntimeError as error:\n        print(type(error).__name__, flush=True)\n"
    )
    code = f"""
        import multiprocessing, child, hwcore
        if __name__ == "__main__":
            hwcore.use("cpu")
            process = multiprocessing.get_context("{method}").Process(target=child.main)
            process.start()
            process.join(60)
    """
    done = site.run(code, HWCORE_SANITIZE="1")
    assert done.stdout == "RaceError\n", done.stderr


# --- The fixture ---


def test_the_fixture_fails_a_test_unless_it_takes_its_races(site):
    (site.folder / "test_it.py").write_text(
        f"""
import hwcore
from hwcore.testing.fixtures import race_sanitizer

hw = hwcore.use("cpu")
PROGRAM = {PROGRAM!r}

def test_without_a_race(race_sanitizer):
    pass

def test_with_a_race(race_sanitizer):
    exec(PROGRAM, dict(hw=hw))

def test_that_expects_its_race(race_sanitizer):
    exec(PROGRAM, dict(hw=hw))
    assert [race.kind for race in race_sanitizer.take()] == ["read after write"]
"""
    )
    done = site.execute("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py")
    assert "3 passed, 1 error" in done.stdout
    assert "ERROR test_it.py::test_with_a_race - Failed: hwcore race sanitizer: 1 race" in (
        done.stdout
    )
