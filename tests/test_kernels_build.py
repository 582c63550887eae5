"""Every Triton kernel compiles for GPUs that need not be here, at the shapes of real models, within their registers and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel_builds import CASES, SHARED_LIMIT

ROOT = Path(__file__).resolve().parents[1]
SPILLED = 128  # bytes a thread: more and the tiles are too big (those of dk and dv that spill 124 are the fastest on an H200)
KERNELS = {
    "ring_kernel",
    "ring_combine_kernel",
    "block_forward_kernel",
    "block_delta_kernel",
    "block_keys_kernel",
    "block_queries_kernel",
    "qk_norm_rope_kernel",
    "modulate_kernel",
    "modulate_grad_kernel",
    "gate_kernel",
    "gate_grad_kernel",
}


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_without_a_gpu(arch: int) -> None:
    pytest.importorskip("triton.backends.nvidia")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernel_builds", "--arch", str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {result["case"] for result in results} == set(CASES) and {result["kernel"] for result in results} == KERNELS
    for result in results:
        assert result["spilled"] <= SPILLED and result["shared"] <= SHARED_LIMIT[arch], result
        if result["kernel"] in ("ring_kernel", "block_forward_kernel", "block_keys_kernel", "block_queries_kernel"):
            assert ("wgmma" if arch == 90 else "mma.sync") in result["uses"], f"no tensor cores: {result}"
