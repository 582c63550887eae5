"""Who may import whom, held by reading the source: imports inside functions and under TYPE_CHECKING count as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOTTOM = {
    "worldmodel.config",
    "worldmodel.plain",
    "worldmodel.action",
    "worldmodel.world",
    "worldmodel.errors",
    "worldmodel.flags",
    "worldmodel.amounts",
}
HUB = {"worldmodel.hub", "worldmodel.hub_errors", "worldmodel.hub_transfer", "worldmodel.consent"}
OURS = {"worldmodel", "train", "play", "tests"}

# room -> (rooms of ours it may import, third-party packages it may import; None = any but those named in FORBIDDEN).
# A room is a module or a package, named by its longest listed prefix; a room may always import itself.
RULES: dict[str, tuple[set[str], set[str] | None]] = {
    "worldmodel": ({"worldmodel.session", "worldmodel.video_session", "worldmodel.video_world"} | BOTTOM, set()),
    **{room: (BOTTOM, {"numpy"}) for room in sorted(BOTTOM)},
    "worldmodel.placement": (BOTTOM, set()),
    "worldmodel.footprint": (BOTTOM | {"worldmodel.models", "worldmodel.placement", "worldmodel.runtime"}, {"torch"}),
    "worldmodel.runtime": (BOTTOM, {"torch", "numpy"}),
    "worldmodel.kernels": (set(), {"torch", "triton", "numpy"}),
    "worldmodel.diffusion": (set(), {"torch"}),
    "worldmodel.models": (BOTTOM | {"worldmodel.kernels", "worldmodel.diffusion"}, None),
    "worldmodel.sums": (BOTTOM, set()),
    "worldmodel.hub": (BOTTOM | HUB | {"worldmodel.sums"}, {"huggingface_hub"}),
    "worldmodel.hub_errors": (BOTTOM, {"huggingface_hub"}),
    "worldmodel.consent": (BOTTOM | {"worldmodel.hub_transfer"}, set()),
    "worldmodel.hub_transfer": (BOTTOM | {"worldmodel.sums"}, {"huggingface_hub"}),
    "worldmodel.tensor_files": (BOTTOM, {"torch", "safetensors"}),
    "worldmodel.convert": (BOTTOM | {"worldmodel.models", "worldmodel.tensor_files"}, {"torch"}),
    "worldmodel.publish": (
        BOTTOM | HUB | {"worldmodel.sums", "worldmodel.checkpoint", "worldmodel.video_world"},
        {"huggingface_hub"},
    ),
    "worldmodel.cli": (
        BOTTOM | {"worldmodel.publish", "worldmodel.convert", "worldmodel.assemble", "worldmodel.published"},
        set(),
    ),
    "worldmodel.checkpoint": (BOTTOM | {"worldmodel.models", "worldmodel.runtime", "worldmodel.sums", "worldmodel.cli"}, None),
    "worldmodel.compiled": (
        BOTTOM | {"worldmodel.models", "worldmodel.kernels", "worldmodel.runtime"},
        {"torch"},
    ),
    "worldmodel.frame_program": (BOTTOM | {"worldmodel.models", "worldmodel.diffusion", "worldmodel.runtime"}, {"torch"}),
    "worldmodel.threads": (BOTTOM, {"numpy"}),
    "worldmodel.rolling": (set(), {"torch"}),
    "worldmodel.screen": (BOTTOM | {"worldmodel.runtime"}, {"torch", "numpy"}),
    "worldmodel.dream": (
        BOTTOM
        | {"worldmodel.models", "worldmodel.runtime", "worldmodel.compiled", "worldmodel.frame_program", "worldmodel.screen"}
        | {"worldmodel.rolling"},
        {"torch"},
    ),
    "worldmodel.bench": (
        BOTTOM
        | {"worldmodel", "worldmodel.runtime", "worldmodel.session", "worldmodel.measure", "worldmodel.random_video"}
        | {"worldmodel.game"},
        set(),
    ),
    "worldmodel.measure": (
        BOTTOM
        | {"worldmodel.runtime", "worldmodel.kernels", "worldmodel.session", "worldmodel.video_session"}
        | {"worldmodel.game"},
        {"torch"},
    ),
    "worldmodel.random_video": (BOTTOM | {"worldmodel.runtime", "worldmodel.models", "worldmodel.video_session"}, {"torch"}),
    "worldmodel.session": (
        BOTTOM
        | {"worldmodel.frame_program", "worldmodel.dream", "worldmodel.threads"}
        | {"worldmodel.models", "worldmodel.diffusion"}
        | {"worldmodel.checkpoint", "worldmodel.runtime", "worldmodel.compiled"},
        {"torch", "numpy"},
    ),
    "worldmodel.video_session": (
        BOTTOM
        | {"worldmodel.models", "worldmodel.diffusion", "worldmodel.runtime", "worldmodel.frame_program", "worldmodel.dream"}
        | {"worldmodel.rolling"},
        {"torch", "numpy"},
    ),
    "worldmodel.video_world": (
        BOTTOM
        | {"worldmodel.models", "worldmodel.checkpoint", "worldmodel.sums", "worldmodel.tensor_files", "worldmodel.prompt_list"}
        | {"worldmodel.runtime", "worldmodel.video_session", "worldmodel.prompt_book"}
        | {"worldmodel.placement", "worldmodel.footprint"},
        {"torch", "numpy"},
    ),
    "worldmodel.prompt_book": (BOTTOM | {"worldmodel.models", "worldmodel.compiled", "worldmodel.prompt_list"}, {"torch"}),
    "worldmodel.picture": (BOTTOM, {"numpy", "PIL"}),
    "worldmodel.published": (BOTTOM, set()),
    "worldmodel.obtain": (
        BOTTOM
        | HUB
        | {"worldmodel.published", "worldmodel.prompt_list", "worldmodel.prompt_book", "worldmodel.assemble"}
        | {"worldmodel.video_world", "worldmodel.runtime", "worldmodel.models", "worldmodel.placement"},
        {"huggingface_hub"},
    ),
    "worldmodel.prompt_list": (BOTTOM, set()),
    "worldmodel.assemble": (
        BOTTOM
        | {"worldmodel.models", "worldmodel.convert", "worldmodel.tensor_files", "worldmodel.video_world", "worldmodel.sums"}
        | {"worldmodel.video_session", "worldmodel.prompt_list", "worldmodel.prompt_book", "worldmodel.published"},
        {"torch"},
    ),
    "worldmodel.data": (BOTTOM, None),
    "worldmodel.game": (
        {"worldmodel", "worldmodel.action", "worldmodel.world", "worldmodel.errors", "worldmodel.flags", "worldmodel.data"},
        {"pygame", "numpy", "av"},
    ),
    "train": (
        BOTTOM
        | {"worldmodel", "worldmodel.runtime", "worldmodel.kernels", "worldmodel.diffusion", "worldmodel.models"}
        | {"worldmodel.checkpoint", "worldmodel.session", "worldmodel.data"}
        | {"worldmodel.assemble", "worldmodel.tensor_files", "worldmodel.video_session"}
        | {"worldmodel.video_world", "worldmodel.footprint"},
        None,
    ),
    "play": (
        {"worldmodel"}
        | BOTTOM
        | {
            "worldmodel.game",
            "worldmodel.bench",
            "worldmodel.data",
            "worldmodel.session",
            "worldmodel.runtime",
            "worldmodel.hub",
            "worldmodel.prompt_list",
            "worldmodel.hub_transfer",
            "worldmodel.published",
            "worldmodel.obtain",
            "worldmodel.picture",
        },
        {"numpy"},
    ),
}
NOT_IN_LIBRARY = {"hydra", "omegaconf", "wandb", "tensorboard", "matplotlib"}
FORBIDDEN = {"worldmodel.data": {"torch"}, "worldmodel.game": {"torch"}, "play": {"torch", "hydra", "omegaconf"}}


def sources() -> list[Path]:
    found = [*ROOT.glob("worldmodel/**/*.py"), *ROOT.glob("train/**/*.py"), *ROOT.glob("play.py")]
    assert len(found) > 15, f"the source was not found in {ROOT}"
    return sorted(found)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The longest listed prefix; the bare package stands for its own __init__ alone."""
    fits = [room for room in RULES if module == room or (module.startswith(room + ".") and room != "worldmodel")]
    return max(fits, key=len, default=None)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() or path.is_dir()


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Full names of the modules imported; `from package import submodule` counts as the submodule."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if base.split(".")[0] in OURS and is_module(full) else base)
    return names


def violations(module: str, text: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    if room is None:
        return [f"{module} is in no room of the design: give it one in RULES"]
    friends, third_party = RULES[room]
    wrong = []
    for name in sorted(imports(ast.parse(text), module, is_package)):
        top = name.split(".")[0]
        if top in OURS:
            target = room_of(name)
            if target != room and target not in friends:
                wrong.append(f"{module} ({room}) imports {name}")
        elif top not in sys.stdlib_module_names:
            allowed = third_party is None or top in third_party
            banned = top in FORBIDDEN.get(room, set()) or (module.startswith("worldmodel") and top in NOT_IN_LIBRARY)
            if banned or not allowed:
                wrong.append(f"{module} ({room}) imports {name}")
    return wrong


@pytest.mark.parametrize("path", sources(), ids=lambda path: module_of(path))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    wrong = violations(module_of(path), path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("worldmodel.game.app", "import torch"),
        ("worldmodel.game.app", "def f():\n    from worldmodel.session import open_session"),
        ("worldmodel.game.app", "from worldmodel import models"),
        ("worldmodel.game.app", "from ..models import dit"),
        ("worldmodel.data.episode", "import torch.nn"),
        ("worldmodel.models.dit", "from worldmodel.session import WorldSession"),
        ("worldmodel.models.dit", "import hydra"),
        ("worldmodel.kernels.reference", "from worldmodel.config import DiTConfig"),
        ("worldmodel.diffusion", "from worldmodel.models.dit import DiT"),
        ("worldmodel.config", "import torch"),
        ("worldmodel.action", "from worldmodel.session import WorldSession"),
        ("worldmodel.checkpoint", "import train.state"),
        ("worldmodel.hub", "import torch"),
        ("worldmodel.hub_transfer", "from worldmodel.checkpoint import load_world"),
        ("worldmodel.session", "from omegaconf import OmegaConf"),
        ("train.loop", "from worldmodel.game import app"),
        ("play", "import train"),
        ("play", "import torch"),
        ("worldmodel.helpers", ""),
    ],
)
def test_the_rule_can_fail(module: str, text: str) -> None:
    assert violations(module, text)


def test_no_file_is_called_utils() -> None:
    assert [path.name for path in sources() if "util" in path.stem] == []


def test_importing_the_library_is_cheap() -> None:
    code = "import sys, worldmodel; print([m for m in ('torch', 'numpy', 'pygame') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
