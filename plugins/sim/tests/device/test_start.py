"""How the device comes to be: names, environment, the build and its cache."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from hwcore.errors import ArgumentValueError
from hwcore_sim.device import build

START = "from hwcore_sim import device; device.start()"


def test_start_is_idempotent(sim):
    assert sim.start() is sim.start("sim") is torch.sim


def test_a_second_name_is_an_error(sim):
    with pytest.raises(ArgumentValueError, match="'sim', the device's name in this process"):
        sim.start("other")


def test_importing_registers_nothing(python):
    done = python(
        """
        import hwcore_sim.device, torch
        assert not hwcore_sim.device.is_initialized()
        print(torch._C._get_privateuse1_backend_name(), torch.accelerator.is_available())
        """
    )
    assert done.output == "privateuseone False", done.errors


def test_what_needs_the_device_says_how_to_start_it(python):
    done = python("from hwcore_sim import device; device.pending()")
    assert done.error.startswith("hwcore.errors.CapabilityError: ")
    assert 'hwcore.load_backend("sim")' in done.error


def test_under_another_name_it_is_that_device_everywhere(python):
    done = python(
        f"""
        {START}
        import torch, io
        x = torch.ones(2, device="npu") + 1
        assert x.is_npu and x.cpu().npu().device == torch.device("npu:0")
        assert torch.nn.Linear(2, 2).npu().weight.is_npu
        assert torch.npu.device_count() == 2
        try:
            torch.ones(1, device="npu:5")
        except RuntimeError as error:
            assert "there are 2 simulated devices" in str(error)
        file = io.BytesIO()
        torch.save(x, file)
        file.seek(0)
        assert torch.load(file).is_npu
        with device.denied("topk"):
            try:
                x.topk(1)
            except NotImplementedError as error:
                print(error)
        """,
        HWCORE_SIM_NAME="npu",
    )
    assert "with arguments from the 'npu' backend" in done.output, done.errors


@pytest.fixture
def refusals(python):
    """How ``start`` refuses values of a variable, in one process, which can start it afterwards."""

    def refused(variable, *values):
        done = python(
            f"""
            import os
            from hwcore_sim import device
            from hwcore.errors import ArgumentValueError
            for value in {values!r}:
                os.environ[{variable!r}] = value
                try:
                    device.start()
                except ArgumentValueError as error:
                    print(error)
                else:
                    print(value, "was taken")
            del os.environ[{variable!r}]
            print(device.start("sim").__name__)
            """
        )
        *errors, started = done.output.splitlines()
        assert started == "torch.sim"
        return dict(zip(values, errors, strict=True))

    return refused


def test_names_that_torch_keeps_are_refused_before_anything_is_registered(refusals):
    names = "cpu", "cuda", "hip", "xpu", "mps", "mtia", "meta"
    for name, error in refusals("HWCORE_SIM_NAME", *names).items():
        expected = f"start: HWCORE_SIM_NAME got {name!r} (str); expected a name that torch"
        assert error.startswith(expected)


def test_names_that_are_none_or_taken_are_refused(refusals):
    names = "Sim", "1sim", "my-sim", "sim:0", " ", "nn", "float", "mean"
    for name, error in refusals("HWCORE_SIM_NAME", *names).items():
        assert error.startswith(f"start: HWCORE_SIM_NAME got {name!r} (str)")


def test_a_refused_name_ends_a_program_by_the_errors_name(python):
    done = python(START, HWCORE_SIM_NAME="Sim")
    assert done.error.startswith("hwcore.errors.ArgumentValueError: start: HWCORE_SIM_NAME got")


def test_the_number_of_devices_is_the_environments(python):
    code = f"{START}; import torch; print(torch.accelerator.device_count())"
    assert python(code, HWCORE_SIM_DEVICES="5").output == "5"
    assert python(code).output == "2"


def test_the_memory_of_a_device_is_the_environments(python):
    code = f"{START}; import torch; print(torch.sim.mem_get_info(1))"
    assert python(code, HWCORE_SIM_MEMORY="64M").output == f"({64 << 20}, {64 << 20})"


@pytest.mark.parametrize(
    ("variable", "values"),
    [
        ("HWCORE_SIM_DEVICES", ("0", "65", "two")),
        ("HWCORE_SIM_MEMORY", ("-1", "4 GB")),
        ("HWCORE_SIM_CAPTURE_STREAMS", ("0",)),
        ("HWCORE_SIM_DRAIN", ("sometimes",)),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused_by_name(refusals, variable, values):
    for value, error in refusals(variable, *values).items():
        assert f"{variable} got {value!r}" in error


def test_the_first_drain_policy_is_the_environments(python):
    code = f"""
        {START}
        import torch
        x = torch.ones(1, device="sim")
        print(device.get_drain_policy(), device.pending())
        with device.drain_policy("lazy"):
            pass
        print(device.get_drain_policy())
        """
    assert python(code, HWCORE_SIM_DRAIN="eager").output.split() == ["eager", "0", "eager"]


def test_the_first_drain_policy_is_that_of_the_start(python):
    code = f"""
        {START}
        import os
        os.environ["HWCORE_SIM_DRAIN"] = "eager"
        print(device.get_drain_policy())
        """
    assert python(code, HWCORE_SIM_DRAIN="random:7").output == "random:7"


def test_the_slot_taken_by_another_device_is_an_error_that_names_it(python):
    done = python(f"import torch; torch.utils.rename_privateuse1_backend('acme'); {START}")
    assert done.error.startswith("hwcore.errors.CapabilityError: start: torch's slot")
    assert "`acme`" in done.error


# --- The build -----------------------------------------------------------------------------------

NO_BUILD = """
    import os, pathlib
    from hwcore_sim.device import build
    def compile(folder):
        print("compiling", flush=True)
        {work}
        (folder / (build.NAME + ".so")).write_text("")
    build._compile = compile
    print(build.ensure().exists())
"""


def test_what_was_built_is_used_again(python, tmp_path):
    code = NO_BUILD.format(work="")
    assert python(code, HWCORE_SIM_CACHE=str(tmp_path)).output.split() == ["compiling", "True"]
    assert python(code, HWCORE_SIM_CACHE=str(tmp_path)).output.split() == ["True"]


def test_processes_that_start_together_build_once(tmp_path):
    code = "\n".join(
        line[4:] for line in NO_BUILD.format(work="import time; time.sleep(2)").split("\n")
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "HWCORE_SIM_CACHE": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(len(output) for output in outputs) == [1, 1, 2]
    assert all(output[-1] == "True" for output in outputs)


def test_a_build_that_died_is_not_taken_for_a_good_one(python, tmp_path):
    died = python(NO_BUILD.format(work="os._exit(9)"), HWCORE_SIM_CACHE=str(tmp_path))
    assert died.status == 9
    assert list(tmp_path.glob("building-*"))
    again = python(NO_BUILD.format(work=""), HWCORE_SIM_CACHE=str(tmp_path))
    assert again.output.split() == ["compiling", "True"]
    assert not list(tmp_path.glob("building-*"))


def test_progress_is_told_while_it_builds_and_not_afterwards(python, tmp_path):
    first = python(NO_BUILD.format(work=""), HWCORE_SIM_CACHE=str(tmp_path))
    assert "building the simulated device, about" in first.errors
    assert python(NO_BUILD.format(work=""), HWCORE_SIM_CACHE=str(tmp_path)).errors == ""


def test_without_a_compiler_the_error_says_what_to_install(python, tmp_path):
    done = python(START, HWCORE_SIM_CACHE=str(tmp_path), CXX="no-such-compiler")
    assert done.error.startswith("hwcore.errors.CapabilityError: hwcore_sim: building")
    assert "`no-such-compiler`" in done.error
    assert "Install g++" in done.error


def test_what_the_compiler_says_is_in_the_error(python, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo g++ 12 && exit\necho no such luck >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    done = python(START, HWCORE_SIM_CACHE=str(tmp_path / "cache"), CXX=str(compiler))
    assert "CapabilityError: hwcore_sim: compiling the simulated device got exit" in done.errors
    assert "no such luck" in done.errors


def test_a_cache_that_cannot_be_written_to_is_refused_by_name(python, tmp_path):
    (tmp_path / "file").write_text("")
    done = python(START, HWCORE_SIM_CACHE=str(tmp_path / "file" / "cache"))
    assert done.error.startswith("hwcore.errors.CapabilityError: hwcore_sim: HWCORE_SIM_CACHE got")


def test_without_a_home_to_write_to_another_place_is_used_and_named(python, tmp_path):
    (tmp_path / "home").write_text("")
    code = NO_BUILD.format(work="")
    done = python(code, HWCORE_SIM_CACHE="", HOME=str(tmp_path / "home"), TMPDIR=str(tmp_path))
    assert done.output.split() == ["compiling", "True"]
    assert f"building in {tmp_path}/hwcore-sim-{os.getuid()} instead" in done.errors


def test_other_sources_are_another_build(tmp_path, monkeypatch):
    before = build._key()
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build._key() == before
    pathlib.Path(sources, "graph.h").write_text("// another\n")
    assert build._key() != before


def test_every_source_is_compiled_once(sim):
    parts = [part for unit in build.UNITS for part in unit]
    assert sorted(parts) == sorted(file.stem for file in build.SOURCES.glob("*.cpp"))


def test_loading_what_was_built_imports_no_compiler_support(python):
    code = f"{START}; import sys; print('torch.utils.cpp_extension' in sys.modules)"
    assert python(code).output == "False"
