"""GPUs as their data sheets describe them, and what `--on 2x8xH100` stands for."""

import difflib
import re
from dataclasses import dataclass

from model.errors import InputError, shown

MOST_GPUS = 10**6
EXAMPLES = "8xH100 or, for nodes x GPUs, 2x8xH100"
BY_HAND = "8x80GB,989TF,3350GB/s,450GB/s (memory, matrix products, memory bandwidth, link between GPUs)"


@dataclass(frozen=True)
class Device:
    """A GPU. Bandwidths are of one direction; vendors often print the sum of both."""

    memory: float  # bytes
    flops: float  # FLOP/s of dense matrix products in bfloat16, or in float16 where the GPU has no bfloat16
    memory_bandwidth: float  # bytes/s
    link: float  # bytes/s to the other GPUs of its node
    network: float  # bytes/s, its share of what leaves the node; 0: unknown
    has_bfloat16: bool = True
    is_simulated: bool = False  # training there was tried with a simulated device only


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    device: Device
    name: str  # of the device, as the user gave it

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def _device(memory: float, tflops: float, memory_bandwidth: float, link: float, network: float, **more) -> Device:
    """A device in GB, TFLOP/s and GB/s."""
    return Device(memory * 1e9, tflops * 1e12, memory_bandwidth * 1e9, link * 1e9, network * 1e9, **more)


# Memory, bandwidths and dense products: the vendors' data sheets, with half of what NVIDIA prints for sparse matrices.
# GeForce: the architecture whitepapers (Ampere GA102, Ada, Blackwell), products that are summed in float32. Links: half
# of the printed sum of both directions of NVLink, Infinity Fabric or HCCS, or else PCIe x16. Networks are no property
# of a GPU: 50 GB/s are a 400 Gb/s port for each GPU, as in DGX H100 and MI300X nodes; A100 25, as in DGX A100; V100
# 6.25, four 100 Gb/s ports for eight GPUs, as in DGX-1. L40S 12.5 (100 Gb/s) and 1.25 (10 Gb/s Ethernet) are assumed.
# Huawei prints no data sheet: Ascend 910B3 as its users report it.
DEVICES = {
    "B200": _device(180, 2250, 8000, 900, 50),
    "H200": _device(141, 989, 4800, 450, 50),
    "H100": _device(80, 989, 3350, 450, 50),
    "H800": _device(80, 989, 3350, 200, 50),
    "H20": _device(96, 148, 4000, 450, 50),
    "A100-80GB": _device(80, 312, 2039, 300, 25),
    "A100-40GB": _device(40, 312, 1555, 300, 25),
    "A800": _device(80, 312, 2039, 200, 25),
    "V100": _device(32, 125, 900, 150, 6.25, has_bfloat16=False),
    "L40S": _device(48, 362, 864, 32, 12.5),
    "T4": _device(16, 65, 320, 16, 1.25, has_bfloat16=False),
    "RTX5090": _device(32, 209.5, 1792, 64, 1.25),
    "RTX4090": _device(24, 165, 1008, 32, 1.25),
    "RTX3090": _device(24, 71, 936, 32, 1.25),
    "MI300X": _device(192, 1307, 5300, 448, 50),
    "Ascend910B": _device(64, 313, 1600, 196, 25, is_simulated=True),
}

# What is given by hand, in this order, with the units that each takes.
_BYTES, _BYTES_PER_SECOND = {"GB": 1e9, "TB": 1e12}, {"GB/s": 1e9, "TB/s": 1e12}
_GIVEN = (
    ("memory", _BYTES),
    ("matrix products", {"TF": 1e12, "PF": 1e15}),
    ("memory bandwidth", _BYTES_PER_SECOND),
    ("link between GPUs", _BYTES_PER_SECOND),
    ("network per GPU", _BYTES_PER_SECOND),
)


def parse_cluster(text: str) -> Cluster:
    """The GPUs that `--on` names: `H100`, `8xH100`, `2x8xH100` (nodes x GPUs), or numbers in place of the name.

    Raises:
        InputError: it names none, or a device that is unknown.
    """
    found = re.fullmatch(r"(?:(\d{1,7})\s*[x×]\s*)?(?:(\d{1,7})\s*[x×]\s*)?(\S.*)", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"--on: {shown(text)} found, {EXAMPLES} expected; {_known()}")
    first, second, name = found.groups()
    nodes, gpus = (int(first or 1), int(second)) if second else (1, int(first or 1))
    if not 0 < nodes * gpus <= MOST_GPUS:
        raise InputError(f"--on: {shown(text)} is {nodes * gpus:,} GPUs, 1 to {MOST_GPUS:,} expected, as {EXAMPLES}")
    device = _parse_device(text, name)
    if nodes > 1 and not device.network:
        lacks = "the network per GPU, a fifth number such as 50GB/s"
        raise InputError(f"--on: {shown(text)} has several nodes and lacks {lacks}")
    return Cluster(nodes, gpus, device, name)


def _parse_device(text: str, name: str) -> Device:
    known = {_plain(key): device for key, device in DEVICES.items()}
    if (device := known.get(_plain(name))) is not None:
        return device
    parts = name.strip("()").split(",")
    if len(parts) == 1:
        close = difflib.get_close_matches(_plain(name), known, n=1)
        nearest = f"did you mean {next(key for key in DEVICES if _plain(key) == close[0])}? " if close else ""
        raise InputError(f"--on: device {shown(name)} is unknown; {nearest}{_known()}")
    if not len(_GIVEN) - 1 <= len(parts) <= len(_GIVEN):
        raise InputError(f"--on: {shown(text)} gives {len(parts)} numbers, {BY_HAND} expected")
    numbers = [_parse_number(text, part.strip(), *given) for part, given in zip(parts, _GIVEN, strict=False)]
    return Device(*numbers, *[0.0] * (len(_GIVEN) - len(numbers)))


def _parse_number(text: str, part: str, what: str, units: dict[str, float]) -> float:
    for unit, size in units.items():
        found = re.fullmatch(rf"(\d{{1,9}}(?:\.\d{{1,9}})?){re.escape(unit)}", part, re.IGNORECASE)
        if found and float(found[1]) > 0:
            return float(found[1]) * size
    example = f"a number above 0 with {' or '.join(units)}"
    raise InputError(f"--on: {shown(text)} has {shown(part)} for {what}, {example} expected, as in {BY_HAND}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _known() -> str:
    return f"known: {', '.join(DEVICES)}; others by hand: {BY_HAND}"
