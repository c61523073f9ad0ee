"""``hwcore doctor``: it answers whatever is installed, and its exit status says how bad it is."""

from __future__ import annotations

import json
import pathlib

import msgspec
import pytest

from hwcore.cli.report import Report

DOCTOR = ("-m", "hwcore.cli", "doctor")
UNAVAILABLE = """
    @hwcore.hookimpl
    def probe(self):
        return Availability(ok=False, reason="no acme device node", fix="Load the acme driver")
"""
BREAKS_TORCH = """
    def load():
        raise ImportError("libacme.so: cannot open shared object file")
"""
ACTIVATE_FOR_5_S = """
    from hwcore.cli import examination
    examination.ACTIVATION_DEADLINE_S = 5
    torch_import, activation = examination.activate({backend!r})
    print(torch_import.ok, torch_import.error)
    print(activation and (activation.ok, activation.error))
"""


def examine(site, **variables):
    """Run ``doctor --json`` and return its exit status and its report, checked by the schema."""
    done = site.execute(*DOCTOR, "--json", **variables)
    return done.returncode, msgspec.json.decode(done.stdout, type=Report)


def install_extension_that_breaks_torch(site, body=BREAKS_TORCH):
    site.add(
        "torch_acme",
        body,
        good=False,
        distribution="torch-acme",
        group="torch.backends",
        value="torch_acme:load",
    )


def plugin(report, name):
    return next(plugin for plugin in report.plugins if plugin.name == name)


def test_all_is_well_where_only_the_cpu_is_installed(site):
    status, report = examine(site)
    assert (status, report.exit_code) == (0, 0)
    assert report.selection.backend == "cpu"
    assert report.torch_import.ok
    assert report.activation.ok
    assert report.activation.hooks["create_stream"] == "plugin"
    assert report.activation.hooks["create_graph"] == "default"
    assert not report.activation.compile_enabled
    assert "eager" in report.activation.compile_reason


def test_a_plugin_is_described_by_its_distribution_entry_point_and_file(site):
    site.add("acme", version="2.3")
    _, report = examine(site)
    acme = plugin(report, "acme")
    assert (acme.distribution, acme.version) == ("hwcore-acme", "2.3")
    assert acme.entry_point == "hwcore_acme:Plugin"
    assert acme.file == str(site.folder / "hwcore_acme.py")
    assert (acme.state, acme.api, acme.api_version) == ("available", "compatible", "1.0")
    assert report.selection.backend == "acme"
    assert "highest priority" in report.selection.why


def test_unavailable_hardware_is_not_an_error_and_comes_with_its_fix(site):
    site.add("acme", UNAVAILABLE)
    status, report = examine(site)
    acme = plugin(report, "acme")
    assert status == 0
    assert (acme.state, acme.reason, acme.fix) == (
        "unavailable",
        "no acme device node",
        "Load the acme driver",
    )
    assert "acme" in report.selection.warning


@pytest.mark.parametrize(
    "body",
    [
        "import no_such_module",
        "raise SystemExit(3)",
        "import os; os.abort()",
        "x = (",
    ],
)
def test_a_broken_plugin_gives_exit_status_1_and_the_others_are_still_examined(site, body):
    site.add("aardvark", body, good=False)
    site.add("zebra")
    status, report = examine(site)
    assert status == 1
    assert plugin(report, "aardvark").state == "broken"
    assert "hwcore-aardvark 1.0" in plugin(report, "aardvark").error
    assert plugin(report, "zebra").state == "available"
    assert "HWCORE_DISABLE_PLUGINS=aardvark" in report.selection.error


def test_a_broken_plugin_beside_a_named_backend_gives_exit_status_1(site):
    site.add("acme", "import no_such_module", good=False)
    status, report = examine(site, HWCORE_BACKEND="cpu")
    assert (status, report.selection.backend, report.selection.error) == (1, "cpu", None)


def test_a_plugin_for_another_contract_is_incompatible(site):
    site.add("acme", "info = {**info, 'api_version': '2.0'}")
    _, report = examine(site)
    assert plugin(report, "acme").api == "incompatible"
    assert "pip install -U hwcore" in plugin(report, "acme").error


def test_a_named_backend_that_is_unavailable_gives_exit_status_2(site):
    site.add("acme", UNAVAILABLE)
    status, report = examine(site, HWCORE_BACKEND="acme")
    assert status == 2
    assert "no acme device node" in report.selection.error


def test_an_unknown_named_backend_gives_exit_status_2(site):
    status, report = examine(site, HWCORE_BACKEND="cpuu")
    assert status == 2
    assert "Did you mean `cpu`" in report.selection.error


def test_a_tie_gives_exit_status_2(site):
    site.add("acme")
    site.add("apex")
    status, report = examine(site)
    assert status == 2
    assert "`acme`" in report.selection.error
    assert "`apex`" in report.selection.error


def test_a_disabled_plugin_is_listed_and_not_loaded(site):
    site.add("acme", "raise RuntimeError('was loaded')", good=False)
    status, report = examine(site, HWCORE_DISABLE_PLUGINS="acme")
    assert status == 0
    assert plugin(report, "acme").state == "disabled"
    assert report.variables["HWCORE_DISABLE_PLUGINS"] == "acme"


def test_two_distributions_of_one_name_are_both_shown(site):
    site.add("acme", distribution="acme-one")
    site.add("acme", distribution="acme-two")
    status, report = examine(site)
    assert status == 1
    assert {p.distribution for p in report.plugins if p.name == "acme"} == {"acme-one", "acme-two"}
    assert "acme-one" in report.selection.error
    assert "acme-two" in report.selection.error


def test_an_extension_that_breaks_import_torch_is_foreseen_and_its_fix_named(site):
    install_extension_that_breaks_torch(site)
    status, report = examine(site)
    assert status == 2
    assert not report.torch_import.ok
    assert "libacme.so" in report.torch_import.error
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in report.torch_import.fix
    assert "torch_acme" in report.torch_import.fix
    assert report.activation.ok, "hwcore itself imports torch without its extensions"


def test_with_autoload_off_the_same_extension_is_harmless(site):
    install_extension_that_breaks_torch(site)
    status, report = examine(site, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (status, report.torch_import.ok) == (0, True)


def test_hwcore_runs_beside_an_extension_that_breaks_import_torch(site):
    install_extension_that_breaks_torch(site)
    done = site.run(
        """
        import os, hwcore
        hw = hwcore.current_backend()
        import torch
        print(hw.info.name, torch.ones(2).sum().item())
        print(os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
        """
    )
    assert done.stdout == "cpu 2.0\nNone\n", done.stderr


def test_a_torch_that_cannot_be_imported_is_an_error_that_names_doctor(site):
    (site.folder / "torch.py").write_text("raise ImportError('libtorch.so is damaged')")
    done = site.run("import hwcore; hwcore.current_backend()")
    assert "TorchImportError" in done.error
    assert "libtorch.so is damaged" in done.error
    assert "Run `hwcore doctor`" in done.error
    status, report = examine(site)
    assert status == 2
    assert "libtorch.so is damaged" in report.torch_import.error
    assert report.torch_import.fix.startswith("Reinstall torch")


@pytest.mark.parametrize(
    ("setup", "said"),
    [("raise OSError('driver too old')", "driver too old"), ("import os; os._exit(7)", "status 7")],
)
def test_a_selected_backend_that_cannot_be_activated_gives_exit_status_2(site, setup, said):
    site.add("acme", f"@hwcore.hookimpl\ndef setup(self):\n    {setup}\n")
    status, report = examine(site)
    assert status == 2
    assert plugin(report, "acme").state == "available"
    assert not report.activation.ok
    assert said in report.activation.error


@pytest.mark.parametrize("end", ["os._exit(7)", "os.abort()"])
def test_a_torch_that_ends_the_process_is_not_called_working(site, end):
    (site.folder / "torch.py").write_text(f"import os; os.write(2, b'illegal opcode'); {end}")
    status, report = examine(site)
    assert status == 2
    assert not report.torch_import.ok
    assert "illegal opcode" in report.torch_import.error
    assert not report.activation.ok


def test_an_extension_that_ends_the_process_is_told_from_a_torch_that_does(site):
    install_extension_that_breaks_torch(site, "def load():\n    import os\n    os._exit(7)")
    status, report = examine(site)
    assert status == 2
    assert "exit status 7" in report.torch_import.error
    assert "torch_acme" in report.torch_import.fix
    assert report.activation.ok, "hwcore itself imports torch without its extensions"


@pytest.mark.parametrize("backend", ["cpu", None])
def test_a_torch_that_hangs_is_not_called_working(site, backend):
    (site.folder / "torch.py").write_text(
        "import os, time; os.write(2, b'waiting'); time.sleep(99)"
    )
    torch_import, activation = site.run(ACTIVATE_FOR_5_S.format(backend=backend)).output
    error = "the process hung for 5 s and was ended. Its last output: waiting."
    assert torch_import == f"False {error}"
    assert activation == str(backend and (False, error))


def test_what_was_said_before_a_hang_is_kept(site):
    (site.folder / "torch.py").write_text("")
    site.add("acme", "import time; time.sleep(99)", good=False)
    torch_import, activation = site.run(ACTIVATE_FOR_5_S.format(backend="acme")).output
    assert torch_import == "True None"
    assert activation == "(False, 'the process hung for 5 s and was ended.')"


def test_a_driver_that_ends_the_process_after_its_answer_has_not_worked(site):
    body = "@hwcore.hookimpl\ndef setup(self):\n    import atexit, os\n    super().setup()\n"
    site.add("acme", body + "    atexit.register(os._exit, 7)\n")
    status, report = examine(site)
    assert status == 2
    assert report.torch_import.ok
    assert not report.activation.ok
    assert "exit status 7" in report.activation.error
    assert report.activation.device_count == 1, "what it said before is kept"


def test_the_last_words_of_a_driver_that_ends_the_process_are_shown(site):
    body = "@hwcore.hookimpl\ndef setup(self):\n    import os\n    os.write(2, b'no firmware')\n"
    site.add("acme", body + "    os._exit(7)\n")
    _, report = examine(site)
    assert report.torch_import.ok
    assert "exit status 7" in report.activation.error
    assert "no firmware" in report.activation.error


SAYS_ITS_OWN = """
    asked = ("cumsum", "topk")

    @hwcore.hookimpl
    def needs_cpu_fallback(self, tensor, purpose):
        return purpose in self.asked

    @hwcore.hookimpl
    def kernels(self):
        return {"gather_rows": print, "gather_row": print}
"""


def test_what_runs_on_the_cpu_and_which_kernel_of_an_operation_runs_is_said(site):
    site.add("acme", SAYS_ITS_OWN)
    status, report = examine(site)
    assert (status, report.activation.on_cpu_error) == (0, None)
    assert report.activation.on_cpu == ["cumsum", "topk"]
    kernels = report.activation.kernels
    assert kernels["gather_rows"] == "plugin"
    assert kernels["assert_and_invalidate"] == "reference"
    assert kernels["gather_row"] == "unknown"
    text = " ".join(site.execute(*DOCTOR).stdout.split())
    assert "on the CPU (2), for the plugin says that the device lacks them" in text
    assert "each time: cumsum, topk" in text
    assert "kernels of the plugin (1): gather_rows" in text
    assert "portable references" in text
    assert "assert_and_invalidate" in text
    assert "kernels that the core never calls (1): gather_row" in text


def test_where_nothing_runs_on_the_cpu_nothing_is_said_of_it(site):
    _, report = examine(site)
    assert report.activation.on_cpu == []
    assert set(report.activation.kernels.values()) == {"reference"}
    assert "on the CPU (" not in site.execute(*DOCTOR).stdout


@pytest.mark.parametrize("hook", ["", "def needs_cpu_fallback(self): return False"])
def test_only_a_plugin_with_a_word_on_fallback_is_asked_by_a_tensor_of_the_device(site, hook):
    body = "@hwcore.hookimpl\ndef setup(self):\n    import torch\n    torch.empty = None\n"
    site.add("acme", body + (f"@hwcore.hookimpl\n{hook}\n" if hook else ""))
    _, report = examine(site)
    assert report.activation.ok
    assert report.activation.on_cpu == (None if hook else [])


def test_a_device_that_cannot_be_asked_is_still_activated_and_the_reason_shown(site):
    body = """
    @hwcore.hookimpl
    def needs_cpu_fallback(self, tensor, purpose):
        if purpose == "cumsum":
            raise OSError("no memory on the device")
        return False
    """
    site.add("acme", body)
    _, report = examine(site)
    assert report.activation.ok
    assert report.activation.on_cpu is None
    assert "no memory on the device" in report.activation.on_cpu_error
    assert "no memory on the device" in " ".join(site.execute(*DOCTOR).stdout.split())


def test_the_text_fits_80_columns_and_says_what_the_json_says(site):
    site.add("acme", UNAVAILABLE)
    site.add("aardvark", "import no_such_module", good=False)
    done = site.execute(*DOCTOR)
    assert done.returncode == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    text = " ".join(done.stdout.split())
    for words in ("no acme device node", "Load the acme driver", "no_such_module", "exit status 1"):
        assert words in text


def test_doctor_imports_no_torch_itself(site):
    done = site.run(
        """
        import sys
        from click.testing import CliRunner
        from hwcore.cli import main
        result = CliRunner().invoke(main, ["doctor"])
        print(result.exit_code, "torch" in sys.modules)
        """
    )
    assert done.stdout == "0 False\n", done.stderr


def test_other_variables_are_not_printed(site):
    done = site.execute(*DOCTOR, "--json", HWCORE_BACKEND="cpu", SECRET_TOKEN="hunter2")
    assert "hunter2" not in done.stdout
    assert json.loads(done.stdout)["variables"]["HWCORE_BACKEND"] == "cpu"


def test_the_documented_schema_is_the_one_printed():
    documented = pathlib.Path(__file__).parents[2] / "docs" / "doctor.schema.json"
    assert json.loads(documented.read_text()) == msgspec.json.schema(Report)
