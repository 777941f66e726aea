"""What the program knows of accelerators, and that only one file does."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import accelerator
from model.errors import InputError
from model.training.determinism import random_state
from tests import forks
from utils import pick_device

ROOT = Path(__file__).parents[2]
KNOWS = ROOT / "model" / "accelerator.py"
NAMES = {"cuda", "mps", "npu", "xpu", "musa", "mlu", "nccl", "hccl", "xccl", "mccl", "cncl"}


def places_that_name_a_type(path: Path) -> list[str]:
    """`torch.cuda`, `torch.backends.mps` and the like, and strings that are the name of a type or of a backend."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_module = isinstance(node, ast.Attribute) and node.attr in NAMES and ast.unparse(node).startswith("torch.")
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_module or (is_text and node.value.partition(":")[0] in NAMES):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_only_one_file_names_a_type_of_accelerator():
    assert places_that_name_a_type(KNOWS)
    others = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("model/**/*.py")] if path != KNOWS]
    assert not [place for path in others for place in places_that_name_a_type(path)]


def test_gradients_are_exchanged_by_the_backend_of_the_type():
    backends = {name: kind.backend for name, kind in accelerator.KINDS.items()}
    theirs = torch.distributed.Backend.default_device_backend_map  # of the types that torch itself has
    assert backends == backends | {name: theirs[name] for name in theirs if name in backends}
    assert [backends[name] for name in ("npu", "musa", "mlu")] == ["hccl", "mccl", "cncl"]
    assert accelerator.backend(None) == accelerator.backend(torch.device("cpu")) == "gloo"
    assert accelerator.backend(torch.device("cuda", 1)) == "nccl"


def test_an_unknown_type_gets_what_is_safe_everywhere():
    kind = accelerator.kind_of("meta")
    assert kind.vendor == "meta" and kind.backend == "gloo"
    assert not any(
        (kind.has_complex, kind.has_flash_kernels, kind.has_grouped_products, kind.runs_ahead, kind.compiles)
    )


def test_an_amd_gpu_is_named_so_though_torch_calls_its_type_cuda():
    code = (
        "import torch; torch.version.hip = '7.1'; torch.cuda.get_device_name = lambda device: 'Radeon RX 7900 XTX'\n"
        "from model import accelerator; device = torch.device('cuda')\n"
        "print([accelerator.vendor('cuda'), accelerator.name(device), accelerator.graph_problem(device)])"
    )
    printed = forks.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(printed) == ["AMD", "AMD Radeon RX 7900 XTX", "graphs were not tried on AMD GPUs"]


def test_only_types_with_known_graphs_have_them():
    assert accelerator.graph_problem(torch.device("cuda")) is None
    for name in ("cpu", "xpu", "mps", "meta"):
        assert "no graphs are known" in accelerator.graph_problem(torch.device(name))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("gpu", "one of auto, cpu, cuda, cuda:N, npu, xpu, musa, mlu, mps expected"),
        ("meta", "one of auto, cpu"),
        ("cpu:1", "one of auto, cpu"),
        ("cuda:99", "but torch sees"),
        ("xpu:99", "but torch sees"),
        ("npu", "but torch_npu, which adds it to torch, is not installed"),
        ("mlu:1", "but torch_mlu, which adds it to torch, is not installed"),
    ],
)
def test_a_device_that_is_not_here_is_refused(asked, said):
    with pytest.raises(InputError, match="^device: ") as refused:
        pick_device(asked)
    assert said in str(refused.value)


def test_a_package_that_fails_to_load_is_named_with_its_reason(tmp_path):
    (tmp_path / "torch_musa.py").write_text("raise ImportError('libmusart.so.4: cannot open shared object file')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from model.errors import InputError; from utils import pick_device\n"
        "try: pick_device('musa')\n"
        "except InputError as error: print(error)"
    )
    printed = forks.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch_musa, which adds it to torch, fails to load (libmusart.so.4: cannot open" in printed


def test_checkpoints_hold_the_states_that_earlier_versions_read():
    states = random_state()
    assert {"cuda", "mps"} <= states.keys() and accelerator.are_random_states(states)
    state = torch.get_rng_state()
    assert accelerator.are_random_states(states | {"npu": [state, state], "mps": state})
    for wrong in ({"cuda": 1}, {"cuda": [1]}, {"mps": [state]}, {"npu": [None, "a"]}, {"xpu": "a"}):
        assert not accelerator.are_random_states(states | wrong)
    with pytest.raises(KeyError):
        accelerator.are_random_states({"mps": None})


def test_settings_are_checked_without_torch():
    code = "import json, sys; import model.accelerator; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False


REPORT = """
import json
from model import accelerator
from utils import pick_device, pick_dtype
device, name = pick_device('auto', local_rank=3)
dtype, why = pick_dtype('bfloat16', device)
states = accelerator.random_states()
print(json.dumps([
    str(device), name, str(dtype), accelerator.backend(device), accelerator.free_bytes(device), sorted(states),
]))
"""
AS_PRIVATE_USE = """
from tests.fake_npu import Module
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
Module.get_device_name = lambda self, device=None: {name!r}
Module.is_bf16_supported = lambda self: {bf16}
Module.device_count = lambda self: 2
Module.get_rng_state_all = lambda self: []
_setup_privateuseone_for_python_backend({device!r}, Module())
"""
AS_XPU = """
import torch
torch.xpu.is_available, torch.xpu.device_count = lambda: True, lambda: 2
torch.xpu.get_device_name = lambda device: 'Intel(R) Arc(TM) A770 Graphics'
torch.xpu.is_bf16_supported = lambda including_emulation=True: including_emulation
torch.xpu.mem_get_info = lambda device: (8 * 10**9, 16 * 10**9)
torch.xpu.memory_reserved, torch.xpu.memory_allocated = lambda device: 10**9, lambda device: 10**8
torch.xpu.get_rng_state_all = lambda: []
"""
AS_MPS = """
import torch
torch.mps.is_available, torch.mps.device_count = lambda: True, lambda: 1
torch.mps.is_bf16_supported = lambda: True
torch.mps.recommended_max_memory, torch.mps.driver_allocated_memory = lambda: 9 * 10**9, lambda: 10**8
torch.mps.get_rng_state = lambda: torch.get_rng_state()
"""


def private_use(device: str, name: str, bf16: bool = True) -> str:
    """Code that adds a type of device to torch as a vendor's package does."""
    return AS_PRIVATE_USE.format(device=device, name=name, bf16=bf16)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (private_use("npu", "Ascend910B3"), ["npu:1", "Ascend910B3", "torch.bfloat16", "hccl"]),
        (private_use("npu", "Ascend310P3", bf16=False), ["npu:1", "Ascend310P3", "torch.float16", "hccl"]),
        (private_use("musa", "MTT S4000"), ["musa:1", "Moore Threads MTT S4000", "torch.bfloat16", "mccl"]),
        (private_use("mlu", "MLU370-X8"), ["mlu:1", "Cambricon MLU370-X8", "torch.bfloat16", "cncl"]),
        (AS_XPU, ["xpu:1", "Intel(R) Arc(TM) A770 Graphics", "torch.float16", "xccl"]),
        (AS_MPS, ["mps", "Apple GPU", "torch.bfloat16", "gloo"]),
    ],
)
def test_an_accelerator_is_found_and_named_with_its_dtype_backend_memory_and_random_states(code, expected):
    ran = forks.run([sys.executable, "-c", code + REPORT], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *found, free, states = json.loads(ran.stdout)
    assert found == expected
    assert free == 8_900_000_000
    assert expected[0].partition(":")[0] in states
