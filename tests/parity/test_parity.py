"""Our networks, cache, samplers, cameras and schedules against numbers recorded from public reference implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from parity_case import Case, compare
from parity_run import run

# Recorded beside the outputs, without a tolerance of their own: they say where a failing case went astray.
ALSO = {"mask_frames": 0.0, "call.t": 1e-3, "timesteps": 0.0, "steps_warped": 1e-3, "steps_warped_first": 1e-3, "viewmats": 1e-6}


def test_case(case: Case, record_property: Callable[[str, object], None]) -> None:
    results = run(case)
    outputs = case.names("output")
    assert outputs, "a case without outputs proves nothing"
    unknown = sorted(set(outputs) - set(results))
    assert not unknown, f"outputs that this test does not understand: {unknown}"
    problems = []
    for name, atol in ALSO.items():
        if name in results and name in case.tensors and name not in outputs:
            ours, theirs = results[name].double(), case.tensors[name].double()
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=atol, rtol=0):
                problems.append(f"{name}: {ours.tolist()} is not {theirs.tolist()}")
    for name in outputs:
        error, share = compare(case, name, results[name])
        record_property(f"parity.{case.group}", (error, share))
        if share > 1:
            problems.append(f"{name}: max |error| {error:.3g}, {share:.3g} times what is tolerated")
    assert not problems, "\n".join(problems)
