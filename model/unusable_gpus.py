"""GPUs of this machine that the installed torch cannot use: found without it, named with the reason and the remedy."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from model import accelerator

SMI_SECONDS = 10.0  # that nvidia-smi may take
GET_STARTED = "https://pytorch.org/get-started/locally/"
PREVIOUS = "https://pytorch.org/get-started/previous-versions/"
NVIDIA, AMD, INTEL, ASCEND, MOORE_THREADS, CAMBRICON = (
    "NVIDIA", "AMD", "Intel", "Huawei Ascend", "Moore Threads", "Cambricon",
)  # fmt: skip
PLATFORMS = {NVIDIA: "CUDA", AMD: "ROCm", INTEL: "XPU support"}  # that torch itself is built with or without
DISPLAY, PROCESSING = "0x03", "0x12"  # PCI classes, as they begin
# Each vendor's number on the PCI bus, and the class of what computes. Boards' own displays have Huawei's number too.
PCI = {NVIDIA: ("0x10de", DISPLAY), INTEL: ("0x8086", DISPLAY), ASCEND: ("0x19e5", PROCESSING)}
PCI |= {MOORE_THREADS: ("0x1ed5", DISPLAY), CAMBRICON: ("0xcabc", PROCESSING)}
INTEL_INTEGRATED = "0000:00:02.0"  # a processor's own graphics: slower than the processor
# Variables by which a user hides devices.
HIDING = {
    NVIDIA: ("CUDA_VISIBLE_DEVICES",),
    AMD: ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    INTEL: ("ZE_AFFINITY_MASK",),
    ASCEND: ("ASCEND_RT_VISIBLE_DEVICES",),
    MOORE_THREADS: ("MUSA_VISIBLE_DEVICES",),
    CAMBRICON: ("MLU_VISIBLE_DEVICES",),
}


@dataclass(frozen=True)
class Machine:
    """Where a machine shows its GPUs.

    Attributes:
        root: the folder that holds /proc, /sys and /dev.
        path: where programs are searched, as in PATH; None: this process's PATH.
        environment: variables.
        system: as `sys.platform` names it.
    """

    root: Path = Path("/")
    path: str | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    system: str = sys.platform


@dataclass(frozen=True)
class Build:
    """What a torch can compute on.

    Attributes:
        version: of torch, such as "2.14.1+cpu".
        platforms: vendor -> what torch has for it, such as "CUDA 13.0" or "torch_npu".
        problems: vendor -> what torch or its package said where it could not use the vendor's driver.
    """

    version: str
    platforms: Mapping[str, str] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def installed(cls) -> "Build":
        """This process's torch."""
        import torch

        return cls(str(torch.__version__), accelerator.platforms(), accelerator.problems())


def find_gpus(machine: Machine) -> dict[str, str]:
    """The GPUs of a machine: vendor -> name of the first one. Those that a variable hides are left out."""
    found = {}
    for vendor in HIDING:
        if any(machine.environment.get(name, "0").strip() in ("", "-1") for name in HIDING[vendor]):
            continue
        name = _nvidia_name(machine) if vendor == NVIDIA else None
        if name is not None or _is_on_bus(machine.root, vendor) or _has_device_file(machine.root, vendor):
            found[vendor] = name or f"{vendor} GPU"
    return found


def why_unused(machine: Machine | None = None, build: Build | None = None) -> str | None:
    """A sentence on a GPU that is here and that torch does not use, with what to do; None: there is no such GPU.

    Args:
        machine: None: this one.
        build: None: the installed torch, which sees no accelerator.
    """
    machine = machine or Machine()
    for vendor, name in find_gpus(machine).items():
        return f"{name} found, but {_reason(vendor, machine, build or Build.installed())}"
    return None


def why_kernels_lack(name: str, capability: str, built_for: list[str], is_newer: bool) -> str:
    """A sentence on a GPU that torch sees but has no kernels for.

    Args:
        capability: of the GPU, as torch names it: "6.0", "gfx1103".
        built_for: those that torch was built for.
        is_newer: than all of these.
    """
    remedy = f"a newer torch: {GET_STARTED}" if is_newer else f"a build for an older platform: {PREVIOUS}"
    kernels = f"this torch has no kernels for {capability}, only for {', '.join(built_for)}"
    return f"{name} found, but {kernels}; install {remedy}"


def _reason(vendor: str, machine: Machine, build: Build) -> str:
    torch_here = f"this torch ({build.version})"
    package = accelerator.package_of(vendor)
    if package is not None and vendor in build.problems:
        return f"{package} fails to load ({build.problems[vendor]}); install the vendor's driver and libraries for it"
    if vendor in build.platforms:
        if vendor == NVIDIA and machine.system == "linux" and not _has_driver_file(machine.root):
            if (machine.root / "proc/driver/nvidia").exists():
                return "its files /dev/nvidia* are missing; start the container with its GPUs (docker run --gpus all)"
            return "its driver is not loaded; install the driver, then restart the machine"
        problem = build.problems.get(vendor, "it sees none")
        return (
            f"{torch_here} with {build.platforms[vendor]} cannot use it ({problem}); update the driver, or install the"
            f" build for the driver that is here: {GET_STARTED}"
        )
    if package is not None:
        version = build.version.partition("+")[0]
        where = f": pip install {package}" if vendor == ASCEND else ", which the vendor offers"
        return f"{package}, which adds it to torch, is not installed; install the version for torch {version}{where}"
    has = f", but {', '.join(build.platforms.values())}" if build.platforms else ""
    if vendor == NVIDIA and machine.system == "linux" and not has:
        remedy = "pip install --force-reinstall torch"  # pip's default build on Linux has CUDA
    else:
        remedy = f"the command is on {GET_STARTED}"
    return f"{torch_here} has no {PLATFORMS[vendor]}{has}; install the build for it: {remedy}"


def _nvidia_name(machine: Machine) -> str | None:
    """The first GPU's name, as the driver or nvidia-smi tells it."""
    for information in sorted(machine.root.glob("proc/driver/nvidia/gpus/*/information")):
        text = _read(information)
        if found := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE):
            return _with_vendor(found[1].strip())
    program = shutil.which("nvidia-smi", path=machine.path)
    in_wsl = machine.root / "usr/lib/wsl/lib/nvidia-smi"
    if program is None and os.access(in_wsl, os.X_OK):
        program = str(in_wsl)
    if program is None:
        return None
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, timeout=SMI_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listed.stdout.decode(errors="replace"), re.MULTILINE)
    return None if listed.returncode or found is None else _with_vendor(found[1].strip())


def _with_vendor(name: str) -> str:
    return name if name.startswith(NVIDIA) else f"{NVIDIA} {name}"


def _is_on_bus(root: Path, vendor: str) -> bool:
    number, begins = PCI.get(vendor, ("", ""))
    for device in sorted(root.glob("sys/bus/pci/devices/*")):
        if vendor == INTEL and device.name == INTEL_INTEGRATED:
            continue
        if _read(device / "vendor").strip() == number and _read(device / "class").startswith(begins):
            return True
    return False


def _has_driver_file(root: Path) -> bool:
    """Whether NVIDIA's driver, or Windows in its subsystem for Linux, lets this system use a GPU."""
    return _has_device_file(root, NVIDIA) or (root / "dev/dxg").exists()


def _has_device_file(root: Path, vendor: str) -> bool:
    """Whether the vendor's driver shows a device: under /dev, of AMD's a GPU that is no part of a processor."""
    if vendor == AMD:
        nodes = root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")
        numbers = [dict(line.split() for line in _read(node).splitlines() if len(line.split()) == 2) for node in nodes]
        return any(n.get("simd_count", "0") != "0" and n.get("cpu_cores_count") == "0" for n in numbers)
    names = {
        NVIDIA: "nvidia[0-9]*",
        ASCEND: "davinci[0-9]*",
        MOORE_THREADS: "mtgpu.[0-9]*",
        CAMBRICON: "cambricon_dev[0-9]*",
    }
    return vendor in names and any(root.glob(f"dev/{names[vendor]}"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
