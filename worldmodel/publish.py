"""A world folder to the hub: checked as if it were to be played, given a card with metadata, sent as one commit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from worldmodel.amounts import megabytes
from worldmodel.checkpoint import load_world
from worldmodel.config import WorldConfig
from worldmodel.errors import CheckpointError, ConfigError, HubError
from worldmodel.hub import KINDS, hub_name
from worldmodel.hub_errors import LOG_IN, explained
from worldmodel.sums import SUMS
from worldmodel.video_world import load_video

LIBRARY = "worldmodel"
LICENCE = "apache-2.0"
TAGS = ["world-model", "interactive", "video-generation", "diffusion", "game"]


def push_world(folder: Path, repo: str, private: bool = False, licence: str | None = None) -> str:
    """Upload a world folder to model repository `repo` (ORG/NAME), made if need be; returns the commit.

    The folder itself is not changed. Files of the repository that the world does not have are removed, so that it holds this world
    and nothing else. licence: an identifier of the hub for a card that names none. Raises CheckpointError or ConfigError if the
    folder is damaged, HubError if the hub refuses.
    """
    from huggingface_hub import get_token

    named = hub_name(f"hf://{repo}")
    if named is None or named[1] is not None:
        raise ConfigError(f"{repo!r} is no name of a repository: give ORG/NAME")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a world folder: it has no config.json")
    config, weights_hash = _checked(folder)
    files = _contents(folder, config, licence)
    print(f"{folder}: world {config.name!r}, {len(files)} files, {megabytes(_size(files))}; to {repo}", flush=True)
    with explained(repo, kept=False):
        if get_token() is None:
            raise HubError(f"pushing to {repo} needs an account: {LOG_IN} and run the same command again")
        return _send(repo, files, private, f"World {config.name} ({weights_hash})")


def _checked(folder: Path) -> tuple[WorldConfig, str]:
    """(config, hash of the weights) of a folder whose every part has been read and fits. Raises WorldModelErrors."""
    if WorldConfig.load(folder).family == "wan":
        video = load_video(folder)
        return video.config, video.weights_hash
    world = load_world(folder)
    world.build()
    return world.config, world.weights_hash


def _contents(folder: Path, config: WorldConfig, licence: str | None) -> dict[str, Path | bytes]:
    """What the repository will hold, by name: the folder's files, the card with metadata, and hashes to match."""
    lines = [line.partition("  ") for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
    digests = {name: digest for digest, _, name in lines}
    for name in digests:
        if Path(name).suffix not in KINDS or any(part.startswith(".") for part in name.split("/")):
            raise CheckpointError(f"{folder / name} is of a kind that players do not fetch: export the world without it")
    files: dict[str, Path | bytes] = {name: folder / name for name in digests}
    text = (folder / "README.md").read_text(encoding="utf-8") if "README.md" in files else f"# {config.title or config.name}\n"
    card = card_with_metadata(text, config, licence).encode()
    digests["README.md"] = hashlib.sha256(card).hexdigest()
    sums = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return files | {"README.md": card, SUMS: sums.encode()}


def card_with_metadata(text: str, config: WorldConfig, licence: str | None = None) -> str:
    """A card's text with the hub's YAML block in front, made from the world's own numbers. A block that is there stays as it is."""
    from huggingface_hub import ModelCardData

    if text.startswith("---\n"):
        if licence is not None:
            raise ConfigError("the card names its licence already: leave out --license, or edit README.md and export again")
        return text
    results, known, origin = _results(config), config.provenance.get("license"), config.provenance.get("repo")
    if origin and not (licence or known):
        raise ConfigError(f"these weights were converted from those of {origin}: say what their licence is with --license ID")
    data = ModelCardData(
        license=licence or str(known or LICENCE),
        library_name=LIBRARY,
        pipeline_tag="image-to-video",
        tags=[*TAGS, f"{config.width}x{config.height}"],
        model_name=config.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _results(config: WorldConfig) -> list[Any]:
    """The measured numbers in the form that the hub shows beside a model; only what the provenance holds."""
    from huggingface_hub import EvalResult

    record = config.provenance
    name = f"held-out play of {_at(record, 'data', 'world') or config.name}"

    def result(metric: str, words: str, value: float) -> EvalResult:
        return EvalResult("image-to-video", name, LIBRARY, metric, round(value, 3), metric_name=words)

    found = []
    if isinstance(psnr := _at(record, "codec", "held_out_psnr"), int | float):
        found.append(result("psnr", "PSNR of the codec round trip, dB", psnr))
    for row in _at(record, "evaluation", "rollouts", "by_horizon") or ():
        if isinstance(psnr := _at(row, "psnr", "dream", "mean"), int | float):
            found.append(result("psnr", f"PSNR of the dream after {row.get('horizon')} frames, dB", psnr))
    if isinstance(fps := _at(record, "evaluation", "speed", "fps"), int | float):
        found.append(result("fps", f"frames a second on {_at(record, 'evaluation', 'conditions', 'device')}", fps))
    return found


def _at(record: Any, *keys: str) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _send(repo: str, files: dict[str, Path | bytes], private: bool, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api = HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise ConfigError(f"{repo} is there already and public: change that on its page, or give another name")
    old = [name for name in api.list_repo_files(repo) if name not in files and not name.startswith(".git")]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = []
    operations += [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    operations += [CommitOperationDelete(name, is_folder=False) for name in old]
    return str(api.create_commit(repo, operations=operations, commit_message=message).oid)


def _size(files: dict[str, Path | bytes]) -> int:
    return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())
