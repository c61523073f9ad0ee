"""What a plugin's ``probe()`` may do to the program that asks it: nothing, and it is named."""

from __future__ import annotations

import pytest

from hwcore import errors

SELECT = "import hwcore; print(hwcore.current_backend().info.name)"
PROBE = "@hwcore.hookimpl\ndef probe(self):\n    "

# Each: the plugin's code, then class, builtin and parts of the message.
CASES = {
    "probe raises": (
        PROBE + 'raise OSError("no bus")',
        (errors.ProbeError, RuntimeError),
        ("probe() raised OSError('no bus').",),
    ),
    "probe imports torch": (
        PROBE + "import torch",
        (errors.ProbeError, RuntimeError),
        ('probe() raised ImportError("torch must not be imported before setup()',),
    ),
    "probe exits": (
        PROBE + "import sys; sys.exit(5)",
        (errors.ProbeError, RuntimeError),
        ("probe() crashed the process during probe (exit status 5).",),
    ),
    "probe exits at once, as if all were well": (
        PROBE + "import os; os._exit(0)",
        (errors.ProbeError, RuntimeError),
        ("probe() crashed the process during probe (exit status 0).",),
    ),
    "probe exits and leaves a thread behind": (
        PROBE
        + "import sys, threading, time\n"
        + "    threading.Thread(target=time.sleep, args=(1000,)).start()\n    sys.exit(5)",
        (errors.ProbeError, RuntimeError),
        ("probe() ",),
    ),
    "probe closes every file": (
        PROBE + "import os, time; os.closerange(0, 100); time.sleep(1000)",
        (errors.ProbeError, RuntimeError),
        ("probe() ",),
    ),
    "probe aborts": (
        PROBE + "import os; os.write(2, b'assertion failed'); os.abort()",
        (errors.ProbeError, RuntimeError),
        ("during probe (killed by SIGABRT). Its last output: assertion failed.",),
    ),
    "probe hangs": (
        PROBE + "import time; print('asking the bus', flush=True); time.sleep(1000)",
        (errors.ProbeError, RuntimeError),
        ("probe() hung: probe took longer than 2 s. Its last output: asking the bus.",),
    ),
    "probe returns a bool": (
        PROBE + "return True",
        (errors.PluginReturnError, ValueError),
        ("probe() got True (bool); expected an Availability. Return an Availability",),
    ),
    "probe returns nothing": (
        PROBE + "pass",
        (errors.PluginReturnError, ValueError),
        ("probe() got None (NoneType)",),
    ),
    "probe says no without a reason": (
        PROBE + 'return Availability(ok=False, fix="Buy one")',
        (errors.PluginReturnError, ValueError),
        ("probe() field `reason` got '' (str); expected text that tells the user why",),
    ),
    "probe says no without a fix": (
        PROBE + 'return Availability(ok=False, reason="no card", fix="  ")',
        (errors.PluginReturnError, ValueError),
        ("probe() field `fix` got '  ' (str); expected text",),
    ),
}


@pytest.mark.parametrize(("body", "error", "parts"), CASES.values(), ids=CASES)
def test_broken_probe(site, refused, body, error, parts):
    site.add("acme", body, version="3.1")
    refused(*error, *parts)


def test_the_plugin_after_one_that_hangs_or_crashes_is_still_probed(site):
    site.add("a-hang", PROBE + "import time; time.sleep(1000)")
    site.add("b-crash", PROBE + "import os; os.abort()")
    site.add("c-good")
    site.add("d-hang", "import time; time.sleep(1000)")
    site.add("e-good")
    code = """
        from hwcore import probing
        from hwcore.discovery import installed
        probing.DEADLINES_S.update({"probe": 1.0, "import": 3.0})
        for result in probing.probe(installed()[1:]):
            print(result.origin.name, result.error or result.availability.ok)
    """
    a, b, c, d, e = site.run(code).output
    assert "plugin `a-hang` (hwcore-a-hang 1.0): probe() hung: probe took longer than 1 s" in a
    assert "plugin `b-crash` (hwcore-b-crash 1.0): probe() crashed the process during probe" in b
    assert c == "c-good True"
    assert "plugin `d-hang` (hwcore-d-hang 1.0): probe() hung: import took longer than 3 s" in d
    assert e == "e-good True"


def test_every_broken_plugin_is_named(site):
    site.add("acme", PROBE + "raise OSError('no bus')")
    site.add("apex", PROBE + "raise OSError('no card')")
    lines = site.run(SELECT).stderr.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("hwcore.errors.ProbeError: "))
    assert any("plugin `acme`" in line for line in lines[first:])
    assert lines[-1].startswith("Also broken: plugin `apex` (hwcore-apex 1.0): probe() raised")


def test_the_error_shows_the_plugins_own_traceback(site):
    site.add("acme", PROBE + "raise OSError('no bus')")
    stderr = site.run(SELECT).stderr
    assert "hwcore_acme.py" in stderr
    assert "in probe" in stderr


def test_what_a_plugin_prints_and_reads_does_not_reach_the_program(site):
    noise = """
        import os, subprocess, sys
        print("import")
        os.write(1, b'{"kind": "result"}\\n')

        @hwcore.hookimpl
        def probe(self):
            import os, subprocess, sys
            print("probe", sys.stdin.read(), "x" * 200_000)
            subprocess.run(["echo", "child"])
            os.write(1, b"not a report\\n")
            return Availability(ok=False, reason="none", fix="Buy one")
    """
    site.add("acme", noise)
    code = f"{SELECT}; import sys; print(sys.stdin.read())"
    done = site.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cpu\n\n"
    assert len(done.stderr.splitlines()) == 1  # the warning


def test_what_python_prints_as_it_starts_is_no_answer_of_a_plugin(site):
    (site.folder / "sitecustomize.py").write_text("print('welcome')\nprint('{}')\n")
    site.add("acme")
    done = site.run(SELECT)
    assert done.stdout == "welcome\n{}\nacme\n", done.stderr


def test_the_way_past_works(site):
    site.add("acme", PROBE + "import os; os.abort()")
    site.add("apex", PROBE + "import time; time.sleep(1000)")
    site.add("good", 'info = {**info, "priority": 10}')
    done = site.run(SELECT, HWCORE_DISABLE_PLUGINS="acme,hwcore-apex")
    assert done.output == ["good"]
    assert site.run(SELECT, HWCORE_BACKEND="good").output == ["good"]


def test_a_process_with_many_files_open_can_probe(site):
    site.add("acme")
    code = """
        import os, resource, hwcore
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        print(hwcore.current_backend().info.name)
    """
    assert site.run(code).output == ["acme"]


def test_a_child_that_cannot_start_is_not_blamed_on_a_plugin(site):
    site.add("acme")
    code = """
        import sys, hwcore
        sys.executable = "/bin/false"
        hwcore.current_backend()
    """
    done = site.run(code)
    done.raised(errors.SelectionError, RuntimeError, "/bin/false", "Set sys.executable")
    assert "acme" not in done.error


def test_a_path_object_on_the_import_path_does_not_matter(site):
    site.add("acme")
    code = """
        import pathlib, sys, hwcore
        sys.path.append(pathlib.Path("/nowhere"))
        print(hwcore.current_backend().info.name)
    """
    assert site.run(code).output == ["acme"]


def test_a_probe_may_ask_whether_torch_is_installed(site):
    site.add(
        "acme",
        """
        @hwcore.hookimpl
        def probe(self):
            import importlib.util
            return Availability(ok=importlib.util.find_spec("torch") is not None)
        """,
    )
    assert site.run(SELECT).output == ["acme"]
