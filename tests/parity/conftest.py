"""`pytest tests/parity --parity DIR`: one test for every case of a folder of recorded numbers (default ../shared/parity)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_case
import pytest

DEFAULT = Path(__file__).parents[2].parent / "shared" / "parity"


def _folder(config: pytest.Config) -> Path | None:
    """The folder to test against; None if none was named and the default is absent."""
    named = config.getoption("--parity", default=None)
    if named is None:
        return DEFAULT if (DEFAULT / "index.json").is_file() else None
    folder = Path(config.invocation_params.dir, named)
    if not (folder / "index.json").is_file():
        raise pytest.UsageError(f"--parity {named}: there is no index.json in {folder}")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    _folder(config)  # a mistyped folder is said at once


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = _folder(metafunc.config)
    if folder is None:
        reason = f"no parity set: {DEFAULT} is absent; name one with --parity DIR"
        metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")])
    else:
        metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in parity_case.load_cases(folder)])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The largest error of each group, alone and as a share of what is tolerated."""
    worst: dict[str, list[tuple[float, float]]] = {}
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        for key, value in getattr(report, "user_properties", []):
            if key.startswith("parity."):
                worst.setdefault(key.removeprefix("parity."), []).append(tuple(value))
    for group, values in sorted(worst.items()):
        error, share = max(v[0] for v in values), max(v[1] for v in values)
        terminalreporter.write_line(
            f"parity {group}: {len(values)} tensors, max |error| {error:.2e}, at most {share:.1%} of its tolerance"
        )
