"""What the machine can do, with every version of torch."""

import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.tiny_runs import ONE_THREAD, run
from utils import cpu_features, pick_dtype


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="where /proc/cpuinfo is")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch has nothing to compare with")
def test_an_older_torch_finds_the_same_16_bit_instructions(monkeypatch):
    names = {"avx512_bf16", "amx_bf16", "bf16", "avx512_fp16", "amx_fp16", "fp16_arith"}
    known = cpu_features() & names
    chosen = [pick_dtype(dtype, torch.device("cpu")) for dtype in ("float32", "bfloat16", "float16")]
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_features() & names == known
    assert [pick_dtype(dtype, torch.device("cpu")) for dtype in ("float32", "bfloat16", "float16")] == chosen


@pytest.mark.parametrize(
    ("features", "line"),
    [
        ({"avx512_fp16", "amx_bf16"}, "this CPU has avx512_fp16; bfloat16 is several times as fast on it (amx_bf16)"),
        ({"avx512_fp16", "amx_bf16", "amx_fp16"}, "this CPU has avx512_fp16"),
        ({"avx512_fp16"}, "this CPU has avx512_fp16"),
    ],
)
def test_float16_where_another_dtype_is_faster(features, line, monkeypatch):
    monkeypatch.setattr("utils.cpu_features", lambda: features)
    monkeypatch.delenv("MATECONV_EMULATE_DTYPE", raising=False)
    assert pick_dtype("float16", torch.device("cpu")) == (torch.float16, line)


@pytest.mark.long
def test_a_run_on_the_cpu_is_not_warned_of_a_cuda_without_a_gpu(tmp_path):
    """Of an installed nvcc, by a module of torch that compiling imports."""
    code = "import utils; utils.choose_hardware('cpu', 'float32', 0); import torch.utils.cpp_extension"
    environment = ONE_THREAD | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    result = run([sys.executable, "-c", code], cwd=ROOT, env=environment)
    assert result.returncode == 0 and "CUDA" not in result.stderr, result.stderr
