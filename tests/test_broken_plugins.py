"""A broken plugin stops the program by name, and says what is wrong, where, and the way past it."""

from __future__ import annotations

import pytest

from hwcore import errors

SELECT = "import hwcore; print(hwcore.current_backend().info.name)"
PROBE = "@hwcore.hookimpl\ndef probe(self):\n    "
SETUP = "@hwcore.hookimpl\ndef setup(self):\n    "
NO_PROBE = "import hwcore\nfrom hwcore.types import *\n@hwcore.hookimpl\ndef backend_info():\n    "
INFO = "BackendInfo(name='acme', device_type='cpu', vendor='Test', api_version='1.0')"
MODULE = f"{NO_PROBE}return {INFO}\n@hwcore.hookimpl\ndef probe():\n    return Availability(True)\n"


def version(text):
    return f'info = {{**info, "api_version": {text!r}}}'


# Each: the plugin's code, then class, builtin and parts of the message.
INSIDE = {
    "raises in its class body": (
        'raise OSError("no libacme")',
        (errors.PluginLoadError, ImportError),
        ("entry point `hwcore_acme:Plugin` cannot be loaded", "OSError('no libacme')"),
    ),
    "imports torch": (
        "import torch",
        (errors.PluginLoadError, ImportError),
        ("torch must not be imported before setup()", "Move the import into setup()"),
    ),
    "imports a part of torch": (
        "import torch.nn",
        (errors.PluginLoadError, ImportError),
        ("torch must not be imported before setup()",),
    ),
    "imports what is not there": (
        "import acme_runtime",
        (errors.PluginLoadError, ImportError),
        ("importing `hwcore_acme` raised", "No module named 'acme_runtime'"),
    ),
    "cannot be created": (
        "def __init__(self, device):\n    pass",
        (errors.PluginLoadError, ImportError),
        ("creating `Plugin()` raised", "'device'"),
    ),
    "exits while imported": (
        "import sys; print('fatal: no firmware'); sys.exit(3)",
        (errors.PluginLoadError, ImportError),
        ("raised SystemExit(3)",),
    ),
    "backend_info raises": (
        '@hwcore.hookimpl\ndef backend_info(self):\n    raise OSError("no id")',
        (errors.SetupError, RuntimeError),
        ("backend_info() raised OSError('no id')",),
    ),
    "has another name": (
        'info = {**info, "name": "apex"}',
        (errors.PluginReturnError, ValueError),
        (
            "backend_info() field `name` got 'apex' (str); expected the entry point's name `acme`",
            "Make the two equal",
        ),
    ),
    "API major newer": (
        version("2.0"),
        (errors.ApiVersionError, RuntimeError),
        (
            (
                "backend_info() field `api_version` got '2.0' (str); expected 1.x with x <= 0: "
                "this hwcore's contract is 1.0. Run `pip install -U hwcore`."
            ),
        ),
    ),
    "API major older": (
        version("0.9"),
        (errors.ApiVersionError, RuntimeError),
        ("got '0.9' (str)", "contract is 1.0. Run `pip install -U hwcore-acme`."),
    ),
    "API minor newer": (
        version("1.7"),
        (errors.ApiVersionError, RuntimeError),
        ("got '1.7' (str)", "contract is 1.0. Run `pip install -U hwcore`."),
    ),
    "API version newer, with hooks of its own": (
        version("1.7") + "\n@hwcore.hookimpl\ndef teleport(self):\n    pass",
        (errors.ApiVersionError, RuntimeError),
        ("Run `pip install -U hwcore`.",),
    ),
    "API version malformed": (
        version("1"),
        (errors.ApiVersionError, RuntimeError),
        ('got \'1\' (str); expected "major.minor", such as "1.0"',),
    ),
    "API version not text": (
        version(1.0),
        (errors.ApiVersionError, RuntimeError),
        ('got 1.0 (float); expected "major.minor"',),
    ),
    "hook misspelt": (
        "@hwcore.hookimpl\ndef device_cuont(self):\n    return 1",
        (errors.PluginDefinitionError, TypeError),
        ("hook `device_cuont` does not exist in the contract. Rename it to `device_count`.",),
    ),
    "hook of no known name": (
        "@hwcore.hookimpl\ndef teleport(self):\n    pass",
        (errors.PluginDefinitionError, TypeError),
        ("hook `teleport` does not exist", "See hwcore/hookspecs.py for every hook"),
    ),
    "hook not marked": (
        "def kernels(self):\n    return {}",
        (errors.PluginDefinitionError, TypeError),
        ("`kernels` is not a function marked as", "of that name with @hwcore.hookimpl, or rename"),
    ),
    "hook that is a partial": (
        "import functools\ngraph_pool = hwcore.hookimpl(functools.partial(int, 3))",
        (errors.PluginDefinitionError, TypeError),
        ("`graph_pool` is not a function marked as a hook implementation", "would never run"),
    ),
    "hook twice": (
        (
            "@hwcore.hookimpl(specname='kernels')\ndef more(self):\n    return {}\n"
            "@hwcore.hookimpl\ndef kernels(self):\n    return {}"
        ),
        (errors.PluginDefinitionError, TypeError),
        ("`more` implements hook `kernels` a second time. Keep one of the two",),
    ),
    "hook is a wrapper": (
        "@hwcore.hookimpl(wrapper=True)\ndef kernels(self):\n    return (yield)",
        (errors.PluginDefinitionError, TypeError),
        ("`kernels` is a hook wrapper. Implement the hook itself",),
    ),
    "argument too many": (
        "@hwcore.hookimpl\ndef create_graph(self, size):\n    return 1",
        (errors.PluginDefinitionError, TypeError),
        ("hook `create_graph` takes argument `size`", "it is `create_graph()`. Remove or rename"),
    ),
    "argument too many, with a default": (
        "@hwcore.hookimpl\ndef set_device(self, index, flags=0):\n    return 1",
        (errors.PluginDefinitionError, TypeError),
        ("takes argument `flags=0`", "it is `set_device(index)`"),
    ),
    "arguments of any number": (
        "@hwcore.hookimpl\ndef set_device(self, *args, **kwargs):\n    return 1",
        (errors.PluginDefinitionError, TypeError),
        ("takes argument `*args`", "it is `set_device(index)`"),
    ),
    "argument by keyword alone": (
        "@hwcore.hookimpl\ndef set_device(self, *, index):\n    return 1",
        (errors.PluginDefinitionError, TypeError),
        ("takes argument `index`",),
    ),
    "setup raises": (
        SETUP + 'raise OSError("no firmware")',
        (errors.SetupError, RuntimeError),
        ("setup() raised OSError('no firmware').",),
    ),
}
WHOLE = {
    "module is empty": (
        "",
        (errors.PluginDefinitionError, TypeError),
        ("hook `backend_info` is not implemented. Add `@hwcore.hookimpl def backend_info() ->",),
    ),
    "probe is missing": (
        f"{NO_PROBE}return {INFO}",
        (errors.PluginDefinitionError, TypeError),
        ("required hook `probe` is not implemented. Add `@hwcore.hookimpl def probe",),
    ),
    "does not compile": (
        "def (:",
        (errors.PluginLoadError, ImportError),
        ("importing `hwcore_acme` raised SyntaxError",),
    ),
}


@pytest.mark.parametrize(("body", "error", "parts"), INSIDE.values(), ids=INSIDE)
def test_broken_plugin(site, refused, body, error, parts):
    site.add("acme", body, version="3.1")
    refused(*error, *parts)


@pytest.mark.parametrize(("body", "error", "parts"), WHOLE.values(), ids=WHOLE)
def test_broken_module(site, refused, body, error, parts):
    site.add("acme", body, version="3.1", good=False)
    refused(*error, *parts)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("hwcore_acme:Plagin", ("`hwcore_acme` has no attribute `Plagin`",)),
        ("hwcore_acme:Plugin.inner", ("`hwcore_acme` has no attribute `Plugin.inner`",)),
        ("hwcore_acne:Plugin", ("its module `hwcore_acne` is not there", "stale or broken")),
        ("hwcore_acme.part:Plugin", ("its module `hwcore_acme.part` is not there",)),
    ],
)
def test_an_entry_point_that_names_nothing(site, refused, value, parts):
    site.add("acme", value=value, version="3.1")
    refused(errors.PluginLoadError, ImportError, f"`{value}`", *parts)


def test_a_distribution_whose_module_is_gone_is_named_with_its_folder(site, refused):
    site.add("acme", module="", version="3.1")
    parts = (
        (
            "its module `hwcore_acme` is not there, though hwcore-acme is registered in "
            f"{site.folder}; the installation is stale or broken"
        ),
    )
    refused(errors.PluginLoadError, ImportError, *parts)


def test_the_way_past_works_by_either_name_and_the_rest_is_probed_all_the_same(site):
    # The last one, setup(), breaks a plugin only once it is chosen.
    names = [f"p{index:02}" for index in range(len(INSIDE) - 1)]
    for name, (body, _, _) in zip(names, INSIDE.values(), strict=False):
        site.add(name, body)
    site.add("good")
    code = """
        from hwcore.discovery import installed
        from hwcore.probing import probe
        results = probe(installed()[1:])
        for result in results:
            print(result.origin.name, result.error is None, result.availability)
    """
    lines = site.run(code, timeout_s=200).output
    assert [line.split()[0] for line in lines] == ["good", *names]
    assert lines[0] == "good True Availability(ok=True, reason='', fix='')"
    assert all(line.endswith(" False None") for line in lines[1:])
    for disabled in (names, [f"hwcore-{name}" for name in names]):
        assert site.run(SELECT, HWCORE_DISABLE_PLUGINS=",".join(disabled)).output == ["good"]


def test_a_plugin_of_an_older_minor_version_is_accepted(site):
    site.add("acme", version("1.0"))
    code = f"import hwcore.hookspecs, hwcore.validation as v; v.API_VERSION = '1.3'; {SELECT}"
    assert site.run(code).output == ["acme"]


def test_two_distributions_of_one_name_are_an_error_even_if_one_is_broken(site):
    site.add("acme", distribution="hwcore-acme", version="1.0")
    site.add("acme", "raise OSError", distribution="acme-hwcore", version="2.0")
    parts = (
        "backend name `acme` is offered by ",
        f"acme-hwcore 2.0 ({site.folder})",
        f"hwcore-acme 1.0 ({site.folder})",
        "expected one distribution",
        "Uninstall one, or set HWCORE_DISABLE_PLUGINS=",
    )
    site.run(SELECT).raised(errors.PluginLoadError, ImportError, *parts)
    named = site.run(SELECT, HWCORE_BACKEND="acme")
    named.raised(errors.PluginLoadError, ImportError, *parts)
    assert site.run(SELECT, HWCORE_BACKEND="cpu").output == ["cpu"]
    assert site.run(SELECT, HWCORE_DISABLE_PLUGINS="acme-hwcore").output == ["acme"]


def test_a_plugin_cannot_call_itself_cpu(site):
    site.add("cpu", distribution="fast-cpu")
    parts = (
        "backend name `cpu` is offered by hwcore ",
        f"fast-cpu 1.0 ({site.folder})",
        "The name is that of the built-in backend.",
        "set HWCORE_DISABLE_PLUGINS=fast-cpu",
    )
    site.run(SELECT).raised(errors.PluginLoadError, ImportError, *parts)
    named = site.run(SELECT, HWCORE_BACKEND="cpu")
    named.raised(errors.PluginLoadError, ImportError, *parts)
    assert site.run(SELECT, HWCORE_DISABLE_PLUGINS="fast-cpu").output == ["cpu"]


@pytest.mark.parametrize("value", ["hwcore_acme", "hwcore_acme:box.plugin", "hwcore_acme:Plugin"])
def test_an_entry_point_may_name_a_module_an_instance_or_a_class(site, value):
    body = MODULE + (
        "import types\n"
        "box = types.SimpleNamespace(plugin=types.SimpleNamespace("
        "backend_info=backend_info, probe=probe))\n"
        "class Plugin:\n"
        "    @hwcore.hookimpl\n    def backend_info(self):\n        return backend_info()\n"
        "    @hwcore.hookimpl\n    def probe(self):\n        return probe()\n"
    )
    site.add("acme", body, good=False, value=value)
    code = """
        from hwcore.discovery import installed
        from hwcore.probing import probe
        (result,) = probe(installed()[1:])
        print(result.error, result.availability.ok, result.hooks, result.info.name, result.file)
    """
    (line,) = site.run(code).output
    module = site.folder / "hwcore_acme.py"
    assert line == f"None True ('backend_info', 'probe') acme {module}"


# --- Metadata that cannot be read -----------------------------------------------------------------


def spoil(site, group, text, metadata=True):
    info = site.folder / "left_over-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text(f"[{group}]\n{text}\n")
    if metadata:
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: left-over\nVersion: 1.0\n")


def test_entry_points_that_cannot_be_read_are_an_error_that_names_where(site):
    spoil(site, "hwcore.backends", "no equals sign")
    done = site.run("import hwcore; hwcore.current_backend()")
    done.raised(
        errors.PluginLoadError,
        ImportError,
        "left-over 1.0",
        f"entry_points.txt of left-over in {site.folder} cannot be read",
        "HWCORE_DISABLE_PLUGINS=left-over",
    )
    assert site.run("import hwcore; print(hwcore.use('cpu').info.name)").output == ["cpu"]
    doctor = site.execute("-m", "hwcore.cli", "doctor")
    assert doctor.returncode == 2, "torch itself cannot be imported beside such a file"
    assert "left-over" in doctor.stdout


def test_a_plugin_without_metadata_is_found_and_its_missing_module_named(site):
    spoil(site, "hwcore.backends", "gone = hwcore_gone", metadata=False)
    done = site.run("import hwcore; hwcore.current_backend()")
    done.raised(
        errors.PluginLoadError,
        ImportError,
        "plugin `gone` (a distribution without METADATA",
        "`hwcore_gone` is not there",
    )


def test_two_plugins_without_metadata_are_both_found(site):
    for name in ("gone", "lost"):
        info = site.folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text(f"[hwcore.backends]\n{name} = hwcore_{name}\n")
    code = "from hwcore import discovery; print(*[o.name for o in discovery.installed()])"
    assert site.run(code).output == ["cpu gone lost"]


def test_a_plugin_without_metadata_that_is_found_twice_counts_once(site):
    spoil(site, "hwcore.backends", "gone = hwcore_gone", metadata=False)
    code = "from hwcore import discovery; print(*[o.name for o in discovery.installed()])"
    path = f"{site.folder}:{site.folder}/../{site.folder.name}"
    assert site.run(code, PYTHONPATH=path).output == ["cpu gone"]


@pytest.mark.parametrize(
    ("metadata", "described"),
    [
        (b"Metadata-Version: 2.1\nVersion: 1.0\n", "a distribution without METADATA 1.0"),
        (b"Metadata-Version: 2.1\nName: left-over\n", "left-over unknown version"),
        (b"\xff\xfe\xfa", "a distribution without METADATA unknown version"),
    ],
    ids=["no name", "no version", "no text"],
)
def test_a_plugin_whose_metadata_is_damaged_is_found(site, metadata, described):
    spoil(site, "hwcore.backends", "gone = hwcore_gone", metadata=False)
    (site.folder / "left_over-1.0.dist-info" / "METADATA").write_bytes(metadata)
    code = "from hwcore import discovery; print(discovery.installed()[1])"
    assert site.run(code).output == [f"plugin `gone` ({described})"]


def test_the_first_of_two_copies_of_a_distribution_counts(site, tmp_path):
    site.add("acme", version="2.0")
    older = type(site)(tmp_path / "older")
    older.folder.mkdir(exist_ok=True)
    older.add("acme", version="1.0")
    code = "from hwcore import discovery; print(*[o.version for o in discovery.installed()[1:]])"
    path = f"{site.folder}:{older.folder}"
    assert site.run(code, PYTHONPATH=path).output == ["2.0"]


def test_entry_points_that_are_no_text_are_passed_over_and_said(site):
    spoil(site, "console_scripts", "x = y")
    (site.folder / "left_over-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe\xfa")
    done = site.run("import hwcore; print(hwcore.use('cpu').info.name)")
    assert done.stdout == "cpu\n", done.stderr
    assert f"entry_points.txt of a distribution in {site.folder} cannot be read" in done.stderr


def test_what_is_wrong_with_other_packages_metadata_does_not_matter(site):
    spoil(site, "console_scripts", "no equals sign")
    assert site.run("import hwcore; print(hwcore.current_backend().info.name)").output == ["cpu"]


# --- Ends and newer contracts ---------------------------------------------------------------------


def test_a_setup_that_exits_is_named_and_does_not_end_the_program(site):
    site.add("acme", "@hwcore.hookimpl\ndef setup(self):\n    raise SystemExit('bye')")
    site.run("import hwcore; hwcore.current_backend()").raised(
        errors.SetupError, RuntimeError, "plugin `acme` (hwcore-acme 1.0): setup() raised", "bye"
    )


def test_a_field_of_a_newer_contract_is_answered_with_what_to_install(site):
    site.add("acme", "info = {**info, 'api_version': '1.1', 'new_field': 1}")
    done = site.run("import hwcore; hwcore.current_backend()")
    assert "new_field" in done.error
    assert "this hwcore's contract is 1.0" in done.error
    assert "`pip install -U hwcore`" in done.error


def test_a_name_of_a_newer_contract_is_answered_with_what_to_install(site):
    site.add("acme", "from hwcore.types import NotYetThere", good=False)
    done = site.run("import hwcore; hwcore.current_backend()")
    assert "NotYetThere" in done.error
    assert "`pip install -U hwcore`" in done.error
