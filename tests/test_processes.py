"""One selection per process: threads, children, ``setup()``, and the import of torch."""

from __future__ import annotations

import textwrap

import pytest

from hwcore.errors import (
    ForkError,
    SetupError,
    TorchImportError,
)

COUNTS_SETUP = """
@hwcore.hookimpl
def setup(self):
    import pathlib, time
    super().setup()
    with pathlib.Path("setups").open("a") as file:
        file.write("x")
    time.sleep(0.3)
"""
LIVE = """
@hwcore.hookimpl
def is_initialized(self):
    return True
"""
CHILD = """
import multiprocessing, sys, hwcore

def child(queue):
    try:
        queue.put(hwcore.current_backend().info.name)
    except hwcore.HwcoreError as error:
        queue.put(f"{type(error).__name__}: {error}")

if __name__ == "__main__":
    hwcore.use(sys.argv[2])
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
"""


def in_child(site, method, name):
    path = site.folder / "parent.py"
    path.write_text(CHILD)
    (line,) = site.execute(str(path), method, name).output
    return line


# --- Threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["current_backend()", 'load_backend("acme")', 'use("acme")'])
def test_threads_that_come_at_once_set_up_once(site, call):
    site.add("acme", COUNTS_SETUP)
    code = f"""
        import threading, hwcore
        barrier, found = threading.Barrier(32), []
        def select():
            barrier.wait()
            found.append(hwcore.{call})
        threads = [threading.Thread(target=select) for _ in range(32)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(len(found), len(set(map(id, found))), found[0].info.name)
    """
    assert site.run(code).output == ["32 1 acme"]
    assert (site.folder / "setups").read_text() == "x"


# --- Children -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_select_what_the_parent_selected(site, method):
    site.add("acme")
    site.add("apex")  # a tie: automatic selection in the child would fail
    assert in_child(site, method, "apex") == "apex"


def test_a_forked_child_of_a_live_device_is_told_to_spawn(site):
    site.add("acme", LIVE)
    error = in_child(site, "fork", "acme")
    assert error.startswith(
        "ForkError: hwcore: this process was forked from one with a live `acme`"
    )
    assert 'multiprocessing.get_context("spawn")' in error
    assert issubclass(ForkError, RuntimeError)


def test_a_spawned_child_of_a_live_device_works(site):
    site.add("acme", LIVE)
    assert in_child(site, "spawn", "acme") == "acme"


def test_a_fork_unsafe_device_counts_as_live_from_the_start(site):
    site.add("acme", 'info = {**info, "quirks": info["quirks"] | {"fork_unsafe"}}')
    assert in_child(site, "fork", "acme").startswith("ForkError")


def test_a_fork_is_refused_for_every_way_to_a_backend_and_in_grandchildren(site):
    site.add(
        "acme",
        """
        import os
        pid = os.getpid()

        @hwcore.hookimpl
        def is_initialized(self):
            return self.os.getpid() == self.pid  # as devices answer in a forked child
        """,
    )
    code = """
        import os, hwcore
        hwcore.load_backend("acme")
        def refused():
            names = []
            for call in (hwcore.current_backend, lambda: hwcore.use("cpu"),
                         lambda: hwcore.load_backend("cpu")):
                try:
                    call()
                except hwcore.HwcoreError as error:
                    names.append(type(error).__name__)
            print(*names, flush=True)
        for generation in range(2):
            if pid := os.fork():
                os.waitpid(pid, 0)
                break
            refused()
        if generation == 0:
            print(hwcore.use("acme").info.name)
    """
    refused = "ForkError ForkError ForkError"
    assert site.run(code).output == [refused, refused, "acme"]


def test_a_fork_before_the_device_is_live_is_no_error(site):
    site.add(
        "acme",
        """
        live = False

        @hwcore.hookimpl
        def is_initialized(self):
            return Plugin.live
        """,
    )
    code = """
        import os, hwcore, hwcore_acme
        hw = hwcore.use("acme")
        for live in (False, True):
            hwcore_acme.Plugin.live = live
            if pid := os.fork():
                os.waitpid(pid, 0)
            else:
                try:
                    print(hwcore.current_backend().info.name, flush=True)
                except hwcore.HwcoreError as error:
                    print(type(error).__name__, flush=True)
                os._exit(0)
    """
    assert site.run(code).output == ["acme", "ForkError"]


def test_a_device_that_cannot_say_whether_it_is_live_counts_as_live(site):
    site.add(
        "acme",
        """
        broken = False

        @hwcore.hookimpl
        def is_initialized(self):
            if Plugin.broken:
                raise OSError("no answer from the driver")
            return False
        """,
    )
    code = """
        import os, hwcore, hwcore_acme
        hwcore.use("acme")
        hwcore_acme.Plugin.broken = True
        if pid := os.fork():
            os.waitpid(pid, 0)
        else:
            try:
                hwcore.current_backend()
            except hwcore.HwcoreError as error:
                print(type(error).__name__, flush=True)
            os._exit(0)
    """
    done = site.run(code)
    assert done.stdout == "ForkError\n"
    assert "no answer from the driver" in done.stderr


# --- setup() --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["current_backend()", 'use("acme")', 'load_backend("acme")'])
def test_asking_for_the_backend_from_setup_is_an_error_not_a_deadlock(site, call):
    site.add("acme", f"@hwcore.hookimpl\ndef setup(self):\n    hwcore.{call}")
    done = site.run('import hwcore; hwcore.use("acme")', timeout_s=60)
    done.raised(
        SetupError,
        RuntimeError,
        "plugin `acme` (hwcore-acme 1.0): setup() raised SelectionError",
        "asked for while it is being selected",
        "HWCORE_DISABLE_PLUGINS=acme",
    )


def test_loading_a_backend_cannot_select_one_by_the_way(site):
    site.add("acme", "@hwcore.hookimpl\ndef setup(self):\n    hwcore.current_backend()")
    code = """
        import os, hwcore
        try:
            hwcore.load_backend("acme")
        except hwcore.HwcoreError as error:
            print(type(error).__name__, os.environ.get("HWCORE_BACKEND"))
        print(hwcore.use("cpu").info.name)
    """
    assert site.run(code).output == ["SetupError None", "cpu"]


@pytest.mark.parametrize("call", ["current_backend()", 'use("acme")', 'load_backend("acme")'])
@pytest.mark.parametrize("place", ["import", "probe"])
def test_asking_for_the_backend_before_setup_starts_no_chain_of_children(site, place, call):
    count = """
        import pathlib
        file = pathlib.Path("starts")
        file.open("a").write("x")
        if len(file.read_text()) == 5:
            raise RuntimeError("five children")
    """
    body = textwrap.dedent(count) + f"hwcore.{call}"
    if place == "probe":
        body = "@hwcore.hookimpl\ndef probe(self):\n" + textwrap.indent(body, "    ")
    site.add("acme", body)
    done = site.run('import hwcore; hwcore.use("acme")', timeout_s=60)
    assert done.returncode == 1
    assert "plugin `acme` (hwcore-acme 1.0)" in done.error
    assert "raised SelectionError" in done.error
    assert "asked for while" in done.error
    assert (site.folder / "starts").read_text() == "x"


def test_a_setup_that_fails_is_remembered_and_no_other_device_is_taken(site):
    raises = '    raise OSError("no firmware")\n'
    site.add("acme", COUNTS_SETUP + raises)
    site.add("low", 'info = {**info, "priority": 10}')
    code = """
        import hwcore
        calls = (hwcore.current_backend, hwcore.current_backend, lambda: hwcore.use("acme"),
                 lambda: hwcore.load_backend("acme"), lambda: hwcore.use("low"),
                 lambda: hwcore.use("cpu"))
        for call in calls:
            try:
                call()
            except hwcore.HwcoreError as error:
                print(type(error).__name__, error, getattr(error, "hook", None))
    """
    *same, low, cpu = site.run(code).output
    assert len(same) == 4
    assert set(same) == {same[0]}
    assert same[0].startswith(
        "SetupError plugin `acme` (hwcore-acme 1.0): setup() raised OSError('no firmware'). Fix,"
    )
    assert same[0].endswith("HWCORE_DISABLE_PLUGINS=acme to leave it out. setup")
    assert low.startswith('SelectionError hwcore.use: `name` got "low"; expected "acme"')
    assert cpu.startswith("SelectionError")
    assert (site.folder / "setups").read_text() == "x"
    past = site.run("import hwcore; print(hwcore.use('low'))", HWCORE_DISABLE_PLUGINS="acme")
    assert past.output == ["<hwcore.Backend 'low' from hwcore-low>"]


# --- torch ----------------------------------------------------------------------------------------


def test_an_extension_that_breaks_import_torch_is_left_out(site):
    body = "def autoload():\n    raise OSError('libdevice.so: cannot open')"
    site.add("vendor", body, good=False, group="torch.backends", value="hwcore_vendor:autoload")
    broken = site.run("import torch")
    assert "libdevice.so" in broken.stderr, "this torch loads extensions"
    code = """
        import os, hwcore
        print(hwcore.use("cpu").info.name, os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
    """
    assert site.run(code).output == ["cpu None"]
    assert site.run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="1").output == ["cpu 1"]


def test_an_import_of_torch_that_fails_is_an_error_with_the_cause_and_the_way_on(site):
    (site.folder / "torch.py").write_text("raise OSError('libtorch.so: cannot open')")
    done = site.run("import hwcore; hwcore.use('cpu')")
    done.raised(
        TorchImportError,
        ImportError,
        "`import torch`, needed for backend `cpu`, failed: libtorch.so: cannot open",
        "Run `hwcore doctor`",
    )


def test_a_compiled_function_may_be_called_from_setup_without_a_deadlock(site):
    site.add(
        "acme",
        """
        @hwcore.hookimpl
        def setup(self):
            import __main__
            __main__.helper()
        """,
    )
    code = """
        import hwcore
        @hwcore.compile
        def helper():
            return 1
        helper()
    """
    site.run(code, timeout_s=60).raised(
        SetupError, RuntimeError, "setup() raised SelectionError", "asked for while"
    )
