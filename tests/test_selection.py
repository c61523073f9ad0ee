"""What ``hwcore.current_backend`` takes, given what is installed and what was asked for."""

from __future__ import annotations

import pytest

import hwcore
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    BackendUnavailableError,
    SelectionError,
    UnknownBackendError,
)

SELECT = "import hwcore; print(hwcore.current_backend().info.name)"
ABSENT = """
@hwcore.hookimpl
def probe(self):
    return Availability(ok=False, reason="no /dev/{0}0", fix="Load the {0} driver")
"""
BY_NAME_ONLY = 'info = {**info, "automatic": False}'


# --- Automatic ------------------------------------------------------------------------------------


def test_a_name_in_capitals_is_recognised_as_meant(site):
    done = site.run(SELECT, HWCORE_BACKEND="CPU")
    assert "Did you mean `cpu`?" in done.error


def test_cpu_is_selected_where_no_plugin_is_installed(site):
    assert site.run(SELECT).output == ["cpu"]


def test_an_available_plugin_is_preferred_to_the_cpu(site):
    site.add("acme")
    assert site.run(SELECT).output == ["acme"]


def test_the_available_plugin_of_highest_priority_is_selected(site):
    site.add("low", 'info = {**info, "priority": 10}')
    site.add("mid", 'info = {**info, "priority": 20}')
    site.add("top", 'info = {**info, "priority": 30}' + ABSENT.format("top"))
    assert site.run(SELECT).output == ["mid"]


def test_a_tie_is_an_error_that_names_both(site):
    site.add("acme")
    site.add("apex")
    site.add("low", 'info = {**info, "priority": 10}')
    site.run(SELECT).raised(
        SelectionError,
        RuntimeError,
        "found `acme`, `apex`, available with the same priority 100; expected one best",
        "Set HWCORE_BACKEND=acme",
    )
    assert site.run(SELECT, HWCORE_BACKEND="apex").output == ["apex"]


def test_one_warning_names_every_plugin_that_is_not_available(site):
    site.add("acme", ABSENT.format("acme"))
    site.add("apex", ABSENT.format("apex"), version="2.5")
    done = site.run(SELECT)
    assert done.stdout == "cpu\n", done.stderr
    (warning,) = done.stderr.splitlines()
    for part in (
        "`acme` (hwcore-acme 1.0): no /dev/acme0. Load the acme driver.",
        "`apex` (hwcore-apex 2.5): no /dev/apex0. Load the apex driver.",
        "Set HWCORE_BACKEND=cpu",
    ):
        assert part in warning
    assert site.run(SELECT, HWCORE_BACKEND="cpu").output == ["cpu"]


def test_the_warning_is_a_log_record_of_level_warning(site):
    site.add("acme", ABSENT.format("acme"))
    code = """
        import logging, hwcore
        class Note(logging.Handler):
            def emit(self, record):
                print(record.name, record.levelname)
        logging.getLogger("hwcore").addHandler(Note())
        hwcore.current_backend()
        hwcore.current_backend()
    """
    assert site.run(code).output == ["hwcore WARNING"]


def test_a_plugin_that_is_not_automatic_is_taken_by_name_only(site):
    site.add("acme", BY_NAME_ONLY)
    site.add("apex", BY_NAME_ONLY + ABSENT.format("apex"))
    assert site.run(SELECT).output == ["cpu"]  # and no warning
    assert site.run(SELECT, HWCORE_BACKEND="acme").output == ["acme"]


def test_a_plugin_that_is_not_automatic_is_not_probed_in_automatic_selection(site):
    raises = '\n@hwcore.hookimpl\ndef probe(self):\n    raise OSError("probed")'
    site.add("acme", BY_NAME_ONLY + raises)
    assert site.run(SELECT).output == ["cpu"]


def test_a_plugin_that_is_not_automatic_is_passed_over_even_if_it_was_probed(site):
    """As doctor does, which probes every plugin."""
    site.add("acme", BY_NAME_ONLY)
    site.add("apex", BY_NAME_ONLY + ABSENT.format("apex"))
    code = """
        from hwcore import probing, selection
        request = selection.plan(None, "test")
        decision = selection.decide(request, probing.probe(request.to_probe))
        print(decision.origin.name, decision.warning)
    """
    assert site.run(code).output == ["cpu None"]


# --- By name --------------------------------------------------------------------------------------


def test_a_named_backend_that_is_not_available_is_an_error(site):
    site.add("acme", ABSENT.format("acme"))
    parts = ("backend `acme`", "cannot run on this machine", "no /dev/acme0. Load the acme driver.")
    by_variable = site.run(SELECT, HWCORE_BACKEND="acme")
    by_variable.raised(BackendUnavailableError, RuntimeError, "asked for by HWCORE_BACKEND", *parts)
    by_call = site.run('import hwcore; hwcore.use("acme")')
    by_call.raised(BackendUnavailableError, RuntimeError, "asked for by hwcore.use", *parts)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("acne", "Did you mean `acme`?"), ("zzz", "Install its plugin: pip install hwcore-zzz.")],
)
def test_an_unknown_name_gets_the_list_and_a_near_match(site, name, hint):
    site.add("acme")
    parts = (f'"{name}"; expected an installed one: cpu, acme.', hint)
    by_variable = site.run(SELECT, HWCORE_BACKEND=name)
    by_variable.raised(UnknownBackendError, LookupError, "HWCORE_BACKEND asks for", *parts)
    by_call = site.run(f'import hwcore; hwcore.use("{name}")')
    by_call.raised(UnknownBackendError, SelectionError, "hwcore.use asks for", *parts)


@pytest.mark.parametrize("value", ["", "  ", "\t\n"])
def test_a_blank_variable_means_automatic(site, value):
    site.add("acme")
    assert site.run(SELECT, HWCORE_BACKEND=value).output == ["acme"]


def test_blanks_around_a_name_do_not_matter(site):
    site.add("acme")
    assert site.run(SELECT, HWCORE_BACKEND="  cpu\t").output == ["cpu"]
    assert site.run('import hwcore; print(hwcore.use(" acme "))').output == [
        "<hwcore.Backend 'acme' from hwcore-acme>"
    ]


def test_use_wins_over_the_variable(site):
    site.add("acme")
    code = 'import hwcore; hwcore.use("acme"); print(hwcore.current_backend().info.name)'
    assert site.run(code, HWCORE_BACKEND="cpu").output == ["acme"]
    assert site.run(code, HWCORE_BACKEND="missing").output == ["acme"]


def test_only_the_named_plugin_is_imported(site):
    site.add("acme")
    mark = 'import pathlib; pathlib.Path("imported").touch(); raise OSError("broken")'
    site.add("apex", mark, good=False)
    assert site.run(SELECT, HWCORE_BACKEND="acme").output == ["acme"]
    assert site.run(SELECT, HWCORE_BACKEND="cpu").output == ["cpu"]
    assert not (site.folder / "imported").exists()
    assert site.run(SELECT).returncode == 1
    assert (site.folder / "imported").exists(), "the marker works"


# --- Disabled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["acme", "hwcore-acme", "HWCORE_Acme", " , acme ,,"])
def test_a_plugin_is_disabled_by_its_name_or_its_distribution(site, value):
    site.add("acme")
    assert site.run(SELECT, HWCORE_DISABLE_PLUGINS=value).output == ["cpu"]


def test_several_plugins_are_disabled_at_once(site):
    site.add("acme")
    site.add("apex")
    site.add("low", 'info = {**info, "priority": 10}')
    assert site.run(SELECT, HWCORE_DISABLE_PLUGINS="acme,hwcore-apex").output == ["low"]


def test_disabling_what_is_not_installed_gets_a_warning(site):
    site.add("acme")
    done = site.run(SELECT, HWCORE_DISABLE_PLUGINS="acne")
    assert done.stdout == "acme\n"
    (warning,) = done.stderr.splitlines()
    assert "HWCORE_DISABLE_PLUGINS names `acne`, which is not installed" in warning
    assert "Did you mean `acme`?" in warning
    far = site.run(SELECT, HWCORE_DISABLE_PLUGINS="zzz").stderr
    assert "Installed: acme, cpu, hwcore, hwcore-acme." in far


def test_a_backend_cannot_be_named_and_disabled(site):
    site.add("acme")
    variables = {"HWCORE_BACKEND": "acme", "HWCORE_DISABLE_PLUGINS": "hwcore-acme"}
    parts = ("`acme`", "is disabled by HWCORE_DISABLE_PLUGINS=hwcore-acme. Take it out there")
    site.run(SELECT, **variables).raised(SelectionError, RuntimeError, *parts)


def test_the_cpu_can_be_disabled(site):
    site.add("acme", ABSENT.format("acme"))
    done = site.run(SELECT, HWCORE_DISABLE_PLUGINS="cpu")
    done.raised(
        BackendUnavailableError,
        RuntimeError,
        "found no backend",
        "`cpu` is disabled",
        "`acme` (hwcore-acme 1.0): no /dev/acme0. Load the acme driver.",
        "take cpu out of HWCORE_DISABLE_PLUGINS",
    )
    named = site.run(SELECT, HWCORE_DISABLE_PLUGINS="cpu", HWCORE_BACKEND="cpu")
    named.raised(SelectionError, RuntimeError, "`cpu`", "is disabled")
    site.add("good")
    assert site.run(SELECT, HWCORE_DISABLE_PLUGINS="cpu,acme").output == ["good"]


# --- Once -----------------------------------------------------------------------------------------


def test_a_second_selection_is_the_first_or_an_error(site):
    site.add("acme")
    code = """
        import os, hwcore
        first = hwcore.use("acme")
        print(hwcore.use("acme") is first, hwcore.current_backend() is first)
        try:
            hwcore.use("cpu")
        except hwcore.HwcoreError as error:
            print(type(error).__name__, error)
        print(hwcore.current_backend() is first, os.environ["HWCORE_BACKEND"])
    """
    same, error, after = site.run(code).output
    assert same == "True True"
    assert error.startswith('SelectionError hwcore.use: `name` got "cpu"; expected "acme"')
    assert "named by hwcore.use" in error
    assert "Call hwcore.use before anything else uses hwcore" in error
    assert after == "True acme"


def test_a_selection_that_fails_changes_nothing(site):
    code = """
        import os, hwcore
        try:
            hwcore.use("missing")
        except LookupError:
            print("HWCORE_BACKEND" in os.environ)
        print(hwcore.use("cpu").info.name)
    """
    assert site.run(code).output == ["False", "cpu"]


def test_load_backend_selects_nothing_and_loads_once(site):
    site.add("acme")
    code = """
        import os, hwcore
        acme = hwcore.load_backend("acme")
        print(hwcore.load_backend(" acme ") is acme, "HWCORE_BACKEND" in os.environ)
        print(hwcore.use("cpu").info.name, hwcore.load_backend("cpu") is hwcore.current_backend())
        print(hwcore.load_backend("acme") is acme)
    """
    assert site.run(code).output == ["True False", "cpu True", "True"]


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["use", "load_backend"])
@pytest.mark.parametrize("name", [None, 3, b"cpu", ["cpu"], "", " \t"])
def test_a_name_that_is_no_name_is_refused(hw, function, name):
    kind = ArgumentValueError if isinstance(name, str) else ArgumentTypeError
    with pytest.raises(kind) as caught:
        getattr(hwcore, function)(name)
    assert str(caught.value).startswith(f"hwcore.{function}: `name` got {name!r}")
    assert 'expected a backend\'s name. Name an installed backend, such as "cpu"' in str(
        caught.value
    )
    assert hwcore.current_backend() is hw


def test_load_backend_refuses_an_unknown_name(hw):
    with pytest.raises(UnknownBackendError, match='load_backend asks for backend "zzz"'):
        hwcore.load_backend("zzz")
    assert hwcore.current_backend() is hw
