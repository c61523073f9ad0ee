"""What the probe says of faked trees, libraries and metadata, in the README's words."""

import functools
import pathlib
import subprocess
import sys

import npu_on_sim
import pytest

from hwcore import torch_build
from hwcore.machine import Machine
from hwcore_npu import probe

README = pathlib.Path(__file__).parents[1].joinpath("README.md").read_text()
TORCH = "2.13.0+cpu"
TEXT = "__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = None\nhip = None\n"


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """A machine on which all is well; a test takes something away."""
    return Faked(tmp_path, monkeypatch)


class Faked:
    def __init__(self, root, monkeypatch):
        self.root, self.patch = root, monkeypatch
        self.missing, self.closed, self.environ = [], set(), {}
        self.patch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
        others = [entry for entry in sys.path if not pathlib.Path(entry, "torch_npu").is_dir()]
        self.patch.setattr(sys, "path", [str(root / "site"), *others])
        self.install(TORCH)
        npu_on_sim.install_torch_npu(root / "site", "2.13.0")
        self.add("dev/davinci0", "dev/davinci_manager")

    @property
    def machine(self):
        return Machine(
            root=self.root,
            environ=self.environ,
            load=self._load,
            may_use=lambda node: node.name not in self.closed,  # tests may run as root
            torch=functools.partial(torch_build.installed, [str(self.root / "site")]),
        )

    def available(self):
        return probe.availability(self.machine)

    def add(self, *files, text=""):
        for file in files:
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            (self.root / file).write_text(text)

    def remove(self, *files):
        for file in files:
            (self.root / file).unlink()

    def install(self, torch, text=TEXT):
        for old in self.root.glob("site/torch-*/METADATA"):
            old.unlink()
            old.parent.rmdir()
        self.add(
            f"site/torch-{torch}.dist-info/METADATA",
            text=f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n",
        )
        self.add("site/torch/version.py", text=text)
        self.add("site/torch/__init__.py", text="raise RuntimeError('imported')\n")

    def install_torch_npu(self, version):
        (info,) = self.root.glob("site/torch_npu-*")
        (info / "METADATA").unlink()
        (info / "entry_points.txt").unlink()
        info.rmdir()
        if version:
            file = f"site/torch_npu-{version}.dist-info/METADATA"
            self.add(file, text=f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")

    def _load(self, name):
        if name in self.missing:
            message = f"{name}: cannot open shared object file: No such file or directory"
            raise OSError(message)

    def says(self, reason, fix, poisoned=False):
        """Assert what the probe says, and that the README says it."""
        row = f"| {reason} | {fix} |"
        if poisoned:
            reason += "; and `import torch` fails here, for it loads torch_npu by itself"
            fix += ", and set TORCH_DEVICE_BACKEND_AUTOLOAD=0 until then"
        found = self.available()
        assert (found.ok, found.reason, found.fix) == (False, reason, fix)
        assert row in README


def test_a_machine_with_all_of_it_is_available(faked):
    assert faked.available().ok


def test_no_driver(faked):
    faked.remove("dev/davinci0", "dev/davinci_manager")
    faked.add("proc/modules", text="ext4 1000 1 - Live 0x0\n")
    faked.says(
        "there is no Ascend driver: no /dev/davinci_manager, no drv_davinci in /proc/modules",
        "Install the driver and firmware of the device, and see that `npu-smi info` lists it",
    )


@pytest.mark.parametrize(
    ("node", "lacking"),
    [
        ("dev/davinci0", "/dev/davinci* device node"),
        ("dev/davinci_manager", "/dev/davinci_manager"),
    ],
)
def test_a_driver_without_its_nodes(faked, node, lacking):
    faked.remove(node)
    faked.says(
        f"there is an Ascend driver, but no {lacking}",
        "See what `npu-smi info` and `dmesg` say of the device, and load the driver again",
    )


@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv"])
def test_a_container_without_the_device(faked, mark):
    faked.remove("dev/davinci0", "dev/davinci_manager")
    faked.add("proc/modules", text="drv_davinci_intf_host 1000 1 - Live 0x0\n")
    faked.add(mark)
    faked.says(
        "the host has an Ascend driver, but this container has no /dev/davinci* device node",
        "Start it with --device for /dev/davinci0, davinci_manager, devmm_svm and hisi_hdc",
    )


@pytest.mark.parametrize("closed", [{"davinci_manager"}, {"davinci0"}])
def test_no_permission(faked, closed):
    faked.closed = closed
    faked.says(
        "this user may not open /dev/davinci_manager, or any /dev/davinci* device node",
        "Add the user to their group, such as with `usermod -aG HwHiAiUser USER`",
    )


def test_one_device_that_may_be_opened_is_enough(faked):
    faked.add("dev/davinci1")
    faked.closed = {"davinci1"}
    assert faked.available().ok


def test_the_variable_hides_every_device(faked):
    faked.environ["ASCEND_RT_VISIBLE_DEVICES"] = "7"
    faked.says(
        "ASCEND_RT_VISIBLE_DEVICES=7 hides every device (there are 1)",
        "Unset it, or name devices from 0 to 0",
    )


@pytest.mark.parametrize(("value", "ok"), [("", False), ("-1", False), ("0", True), ("0,7", True)])
def test_what_the_variable_leaves(faked, value, ok):
    faked.environ["ASCEND_RT_VISIBLE_DEVICES"] = value
    assert faked.available().ok == ok


@pytest.mark.parametrize("name", probe.LIBRARIES)
def test_a_library_of_cann_is_missing(faked, name):
    faked.missing = [name]
    found = faked.available()
    assert name in found.reason
    assert "source set_env.sh" in found.fix


def test_cann_is_missing_and_import_torch_fails_with_it(faked):
    faked.missing = ["libascendcl.so"]
    faked.says(
        "CANN's libraries cannot be loaded: libascendcl.so: cannot open shared object file: "
        "No such file or directory",
        "Install the CANN toolkit and run `source set_env.sh` of its folder in this shell",
        poisoned=True,
    )


def test_import_torch_fails_without_a_device_too(faked):
    faked.missing = ["libhccl.so"]
    faked.remove("dev/davinci0", "dev/davinci_manager")
    faked.says(
        "there is no Ascend driver: no /dev/davinci_manager, no drv_davinci in /proc/modules",
        "Install the driver and firmware of the device, and see that `npu-smi info` lists it",
        poisoned=True,
    )


def test_import_torch_is_safe_where_torch_loads_no_extensions(faked):
    faked.missing = ["libhccl.so"]
    faked.patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert "import torch" not in faked.available().reason


def test_torch_npu_is_not_installed(faked):
    faked.install_torch_npu(None)
    faked.says(
        "torch_npu is not installed, and torch 2.13.0+cpu needs it for this device",
        "Run `pip install torch_npu==2.13.0`",
    )


def test_torch_npu_is_for_another_torch(faked):
    faked.install_torch_npu("2.12.0")
    faked.says(
        "torch_npu 2.12.0 is for another torch than 2.13.0+cpu",
        "Run `pip install torch_npu==2.13.0`",
        poisoned=True,
    )


def test_a_post_release_of_torch_npu_is_for_the_same_torch(faked):
    faked.install_torch_npu("2.13.0.post1")
    assert faked.available().ok


def test_torch_is_a_build_for_another_accelerator(faked):
    faked.install("2.13.0+cu130", TEXT.replace("= None", "= '13.0'", 1))
    faked.says(
        "torch 2.13.0+cu130 is a build for cuda, and torch takes one accelerator a process",
        "Run `pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu`",
        poisoned=True,
    )


@pytest.mark.parametrize("version", ["2.13.0+cu130", "2.13.0+rocm7.0", "2.13.0+xpu"])
def test_a_torch_whose_file_cannot_be_read_is_judged_by_its_version(faked, version):
    faked.install(version)
    faked.remove("site/torch/version.py")
    assert f"torch {version} is a build for" in faked.available().reason


def test_torch_is_not_installed(faked):
    faked.remove("site/torch/__init__.py")
    faked.says(
        "torch is not installed",
        "Run `pip install torch --index-url https://download.pytorch.org/whl/cpu`",
        poisoned=True,
    )


def test_a_torch_in_a_source_tree_counts(faked):
    """Without metadata, which ended the probe in an error once."""
    faked.install(TORCH, TEXT)
    (info,) = faked.root.glob("site/torch-*")
    (info / "METADATA").unlink()
    info.rmdir()
    assert faked.available().ok


def test_modules_that_may_not_be_read_are_no_driver(faked):
    faked.remove("dev/davinci0", "dev/davinci_manager")
    faked.add("proc/modules/not_a_file")
    assert "there is no Ascend driver" in faked.available().reason


def test_it_imports_no_torch_and_takes_far_less_than_two_seconds():
    code = """if True:
        import sys, time
        from hwcore_npu.plugin import NpuPlugin
        began = time.perf_counter()
        found = NpuPlugin().probe()
        print("torch" in sys.modules, time.perf_counter() - began < 1)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True"], done.stderr
