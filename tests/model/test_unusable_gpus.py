"""A GPU that torch cannot use is named with the reason and the remedy. Files and programs are faked, nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from model.accelerator import runs_on
from model.unusable_gpus import Build, Machine, find_gpus, why_kernels_lack, why_unused
from tests import forks

ROOT = Path(__file__).parents[2]
CPU_BUILD = Build("2.14.1+cpu")
CUDA_BUILD = Build("2.14.1+cu130", {"NVIDIA": "CUDA 13.0"})
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for a program")


@pytest.fixture
def machine(tmp_path):
    """Builds a machine of files, and of nvidia-smi where what it prints is given."""

    def build(files=(), smi: str | None = None, exit_code: int = 0, system: str = "linux", **variables) -> Machine:
        for name, text in dict(files).items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        if smi is not None:
            program = programs / "nvidia-smi"
            program.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] || exit 9\necho '{smi}'\nexit {exit_code}\n")
            program.chmod(0o755)
        return Machine(tmp_path / "root", str(programs), variables, system)

    return build


def on_bus(vendor: str, kind: str, address: str = "0000:65:00.0") -> dict[str, str]:
    """The files of a device on the PCI bus."""
    return {
        f"sys/bus/pci/devices/{address}/{name}": f"{text}\n" for name, text in (("vendor", vendor), ("class", kind))
    }


def in_kfd(cores: int, units: int) -> dict[str, str]:
    """The files of a device that AMD's driver has."""
    return {"sys/class/kfd/kfd/topology/nodes/1/properties": f"cpu_cores_count {cores}\nsimd_count {units}\n"}


RTX_4090 = {"proc/driver/nvidia/gpus/0000:65:00.0/information": "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ: 170\n"}
NVIDIA_FILE = {"dev/nvidia0": "", "proc/driver/nvidia/version": "NVRM version: 580.65"}


def test_a_machine_without_a_gpu_has_none(machine):
    assert find_gpus(machine()) == {} and why_unused(machine(), CPU_BUILD) is None
    others = on_bus("0x10de", "0x020000") | on_bus(
        "0x19e5", "0x030000", "0000:02:00.0"
    )  # a network card, a board's VGA
    integrated = on_bus("0x8086", "0x030000", "0000:00:02.0") | in_kfd(cores=16, units=4)
    assert find_gpus(machine(others | integrated)) == {}


@POSIX
@pytest.mark.parametrize(
    ("files", "smi", "name"),
    [
        (RTX_4090, None, "NVIDIA GeForce RTX 4090"),
        ({}, "GPU 0: Tesla T4 (UUID: GPU-1)", "NVIDIA Tesla T4"),
        (on_bus("0x10de", "0x030200"), None, "NVIDIA GPU"),
        (NVIDIA_FILE, None, "NVIDIA GPU"),
    ],
)
def test_nvidias_are_found_and_a_torch_without_cuda_is_named_with_the_command(machine, files, smi, name):
    said = why_unused(machine(files, smi), CPU_BUILD)
    assert said.startswith(f"{name} found, but this torch (2.14.1+cpu) has no CUDA; install the build")
    assert said.endswith("pip install --force-reinstall torch") and "\n" not in said
    said = why_unused(machine(files, smi, system="win32"), CPU_BUILD)  # where pip's default build has no CUDA
    assert said.endswith("https://pytorch.org/get-started/locally/")


@POSIX
def test_an_nvidia_smi_that_fails_or_lists_nothing_is_no_gpu(machine):
    assert find_gpus(machine(smi="NVIDIA-SMI has failed", exit_code=9)) == {}
    assert find_gpus(machine(smi="No devices were found")) == {}


@pytest.mark.parametrize(
    ("files", "build", "said"),
    [
        (RTX_4090, CUDA_BUILD, "its files /dev/nvidia* are missing; start the container with its GPUs"),
        (on_bus("0x10de", "0x030000"), CUDA_BUILD, "its driver is not loaded; install the driver"),
        (
            RTX_4090 | NVIDIA_FILE,
            Build("2.14.1+cu130", {"NVIDIA": "CUDA 13.0"}, {"NVIDIA": "The NVIDIA driver on your system is too old"}),
            "with CUDA 13.0 cannot use it (The NVIDIA driver on your system is too old); update the driver, or install",
        ),
        (
            RTX_4090 | NVIDIA_FILE,
            Build("2.14.1+rocm7.1", {"AMD": "ROCm 7.1"}),
            "this torch (2.14.1+rocm7.1) has no CUDA, but ROCm 7.1; install the build for it: the command is on",
        ),
        (in_kfd(cores=0, units=304), CUDA_BUILD, "AMD GPU found, but this torch (2.14.1+cu130) has no ROCm, but CUDA"),
        (
            on_bus("0x8086", "0x038000"),
            CPU_BUILD,
            "Intel GPU found, but this torch (2.14.1+cpu) has no XPU support; in",
        ),
        (
            {"dev/davinci0": ""},
            CPU_BUILD,
            "torch_npu, which adds it to torch, is not installed; install the version for torch 2.14.1: pip install",
        ),
        (
            on_bus("0x19e5", "0x120000"),
            Build("2.14.1", {}, {"Huawei Ascend": "libhccl.so: cannot open shared object file"}),
            "torch_npu fails to load (libhccl.so: cannot open shared object file); install the vendor's driver",
        ),
        ({"dev/mtgpu.0": ""}, CPU_BUILD, "Moore Threads GPU found, but torch_musa, which adds it to torch, is not"),
        ({"dev/cambricon_dev0": ""}, CPU_BUILD, "Cambricon GPU found, but torch_mlu, which adds it to torch, is not"),
    ],
)
def test_the_reason_and_the_remedy_are_those_of_vendor_driver_and_build(machine, files, build, said):
    assert said in why_unused(machine(files), build)


@pytest.mark.parametrize("value", ["", "-1"])
def test_what_the_user_hides_is_not_missed(machine, value):
    assert find_gpus(machine(RTX_4090 | NVIDIA_FILE, CUDA_VISIBLE_DEVICES=value)) == {}
    assert find_gpus(machine(RTX_4090 | NVIDIA_FILE, CUDA_VISIBLE_DEVICES="0"))


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), ["sm_75", "sm_80", "sm_86", "sm_90"], True),  # an RTX 4090: code for 8.6 runs on it
        ((6, 0), ["sm_75", "sm_80", "compute_90"], False),  # a P100
        ((7, 0), ["sm_75", "sm_80"], False),  # a V100
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((12, 1), ["sm_90", "sm_120"], True),
        ((10, 3), ["sm_90"], False),
        ((10, 3), ["sm_90", "compute_90"], True),
        ((8, 0), ["sm_86"], False),
    ],
)
def test_code_runs_on_gpus_of_its_family_and_source_on_later_ones(capability, architectures, runs):
    assert runs_on(capability, architectures) is runs


def test_a_gpu_without_kernels_is_named_with_what_to_install():
    said = why_kernels_lack("NVIDIA Tesla P100", "6.0", ["7.5", "8.0"], is_newer=False)
    assert said.startswith("NVIDIA Tesla P100 found, but this torch has no kernels for 6.0, only for 7.5, 8.0; install")
    assert "older platform" in said
    assert "a newer torch" in why_kernels_lack("NVIDIA GB300", "10.3", ["9.0"], is_newer=True)


FAKED_P100 = """
import torch
from model import accelerator
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_name = lambda device: 'Tesla P100-PCIE-16GB'
torch.cuda.get_device_capability = lambda device: (6, 0)
torch.cuda.get_arch_list = lambda: ['sm_75', 'sm_80', 'sm_90', 'sm_100', 'sm_120', 'compute_120']
from model.errors import InputError
from utils import pick_device
print(*pick_device('auto'))
try: pick_device('cuda')
except InputError as error: print(error)
"""


def test_a_gpu_that_torch_sees_but_has_no_kernels_for_is_left_with_the_reason_or_refused():
    ran = forks.run([sys.executable, "-c", FAKED_P100], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    chosen, refused = ran.stdout.splitlines()
    why = "NVIDIA Tesla P100-PCIE-16GB found, but this torch has no kernels for 6.0, only for 7.5, 8.0, 9.0, 10.0, 12.0"
    assert chosen.startswith(f"cpu {why}; install a build for an older platform: https://")
    assert refused.startswith(f"device: 'cuda' cannot be used: {why}; install")


@POSIX
def test_a_run_begins_with_the_line_and_a_device_that_is_asked_for_is_refused_with_it(machine):
    """By the program that runs, with nvidia-smi on its path; where this machine has a GPU, it is used."""
    path = machine(smi="GPU 0: NVIDIA H20 (UUID: GPU-1)").path
    code = (
        f"import os, sys, torch; os.environ['PATH'] = {path!r}; os.environ.pop('CUDA_VISIBLE_DEVICES', None)\n"
        "from utils import pick_device; from model.errors import InputError\n"
        "if torch.cuda.is_available(): sys.exit(77)\n"
        "print(*pick_device('auto'))\n"
        "try: pick_device('cuda')\n"
        "except InputError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode == 77:
        pytest.skip("a GPU is here")
    assert ran.returncode == 0, ran.stderr
    chosen, refused = ran.stdout.splitlines()
    assert chosen.startswith("cpu NVIDIA H20 found, but ") and "thread" in chosen
    assert refused.startswith("device: 'cuda' found, but torch sees 0 NVIDIA devices here: NVIDIA H20 found, but ")
