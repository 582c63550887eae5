"""Recipes: several runs by one command, skipped when finished, refused when their settings changed."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tests.train_boxes import composed, environment, make_boxes
from train import jobs, record
from train.config import RunConfig, register
from train.recipe import Entry, check_folders, plan, run_recipe, taken
from train.settings import CONF, explain_settings, with_recipe
from train.stage_options import EvaluateStage
from worldmodel.config import WORLDS
from worldmodel.errors import ConfigError

QUICK = ("train.threads=1", "device=cpu", "train.precision=fp32", "train.sample_minutes=0", "stage.warmup=2")
TEACHER: dict[str, object] = {"model": {}, "info": {"stage": "teacher"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_boxes(tmp_path_factory.mktemp("recipe") / "data", episodes=8, length=40)


def words(data: Path, *overrides: str, launcher: tuple[str, ...] = ("-m", "train")) -> list[str]:
    return [sys.executable, *launcher, "experiment=tiny", f"data.root={data}", *QUICK, *overrides]


def finish(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(), text=True, capture_output=True, timeout=180)


def plan_of(outer: RunConfig, asked: Sequence[str] = ()) -> list[Entry]:
    """The entries of composed settings, with folders below /out."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan(outer, asked, Path("/out"))


def planned(*overrides: str, experiment: str = "tiny") -> list[Entry]:
    """The entries that a command line asks for."""
    asked = with_recipe([f"experiment={experiment}", *overrides])
    return plan_of(composed(*asked), asked)


def test_entries_are_composed_from_experiment_entry_and_command_line() -> None:
    codec, ar, cd, evaluate = planned("seed=3", "stage.lr=5e-4", "stage.levels=12", "model.dit.layers=1")
    assert [e.config.stage.kind for e in (codec, ar, cd, evaluate)] == ["codec", "ar_diffusion", "causal_cd", "evaluate"]
    assert {e.config.seed for e in (codec, ar, cd, evaluate)} == {3} and ar.config.model.dit.layers == 1
    assert [getattr(e.config.stage, "lr", None) for e in (codec, ar, cd, evaluate)] == [5e-4, 5e-4, 5e-4, None]
    assert getattr(cd.config.stage, "levels", 0) == 12 and not hasattr(ar.config.stage, "levels")
    assert (cd.config.codec, cd.config.init, cd.needs) == ("/out/codec", "/out/ar", ("codec", "ar"))
    assert evaluate.config.world == "/out/cd/export" and evaluate.needs == ("cd",)
    assert (codec.folder, codec.config.name, codec.config.steps) == (Path("/out/codec"), "tiny/codec", 300)


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
def test_every_recipe_composes(experiment: str) -> None:
    entries = planned(experiment=experiment)
    begins = "teacher" if experiment == "wan" else "codec"  # public weights have theirs
    assert (entries[0].config.stage.kind, entries[-1].config.stage.kind) == (begins, "evaluate")


def test_settings_of_training_are_none_of_an_evaluation_s() -> None:
    """What conf/training says reaches every stage that trains; one that does not goes without, wherever the group is named."""
    for asked in ((), ("training=wan", "stage.batch=3")):
        *trained, evaluate = planned(*asked, experiment="wan")
        assert {e.config.stage.clip_frames for e in trained} == {21}  # type: ignore[attr-defined]
        assert evaluate.config.stage.kind == "evaluate" and evaluate.config.world == "/out/dmd/export"
    by_hand = with_recipe(["experiment=wan", "training=wan", "stage=evaluate", "world=x"])
    assert by_hand == ["experiment=wan", "stage=evaluate", "world=x", "~training"]
    assert composed(*by_hand).stage == EvaluateStage() and composed(*by_hand).data.world == "video"


def test_another_game_takes_the_recipe_with_its_own_data_and_model() -> None:
    rooms, racing = planned(experiment="rooms"), planned(experiment="racing")
    assert [e.text for e in rooms] == [e.text for e in racing]
    assert {e.config.data.world for e in racing} == {"racing"} and {e.config.model.dit.dim for e in racing} == {256}


def test_the_first_of_two_phases_scales_with_the_budget() -> None:
    forced = next(e for e in planned("scale=0.1", experiment="compare") if e.name == "self_forcing").config
    assert (forced.steps, getattr(forced.stage, "pretrain_steps", 0)) == (100, 50)


def test_a_budget_on_the_command_line_replaces_those_of_the_entries_and_scale_multiplies() -> None:
    assert record.budget(planned("minutes=2", "scale=0.5")[0].config) == {"steps": None, "minutes": 1.0}
    assert [e.config.steps for e in planned("scale=0.1")] == [30, 30, 6, None]
    assert [record.budget(e.config)["steps"] for e in planned("steps=7")] == [7, 7, 7, None]


def export(folder: Path, **files: dict[str, object]) -> Path:
    """A folder with descriptions of what it exported; nothing else of it is read before it is used."""
    for name, content in files.items():
        (folder / "export").mkdir(parents=True, exist_ok=True)
        (folder / "export" / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_an_entry_may_be_taken_from_elsewhere(tmp_path: Path) -> None:
    codec = export(tmp_path / "codec", codec={"codec": {}})
    ar = export(tmp_path / "ar", config={"model": {}})
    cd, evaluate = planned(f"recipe.codec={codec}", f"recipe.ar={ar}")
    assert (cd.name, cd.number, cd.config.codec, cd.config.init) == ("cd", 1, str(codec), str(ar))
    assert evaluate.config.world == "/out/cd/export"
    *_, evaluate = planned(f"recipe.cd={ar}")
    assert evaluate.config.world == str(ar / "export")
    *_, evaluate = planned(f"recipe.cd={ar}/export")
    assert evaluate.config.world == str(ar / "export")


def test_an_experiment_s_file_may_put_a_folder_in_the_place_of_inherited_settings() -> None:
    above = {"recipe": {"ar": ["stage=ar_diffusion"], "evaluate": ["stage=evaluate", "world=@ar"]}}
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), above, {"recipe": {"ar": str(WORLDS / "rooms")}})
    outer = dataclasses.replace(composed("experiment=tiny", "stage=recipe"), recipe=OmegaConf.to_object(merged.recipe))
    (evaluate,) = plan_of(outer)
    assert evaluate.config.world == str(WORLDS / "rooms") and taken(outer) == {"ar": WORLDS / "rooms"}


def test_what_is_taken_from_elsewhere_must_fit(tmp_path: Path) -> None:
    codec, teacher = (export(tmp_path / n, **{d: c}) for n, d, c in (("c", "codec", {"codec": {}}), ("t", "model", TEACHER)))
    wrong = {
        "that entry is taken from .*/t, there is nothing to do for it": (f"recipe.ar={teacher}", "only=ar"),
        "recipe entry 'cd': init=@ar is a bidirectional network": (f"recipe.ar={teacher}", f"recipe.codec={codec}"),
        "recipe entry 'evaluate': .*/c is not a world folder": (f"recipe.cd={codec}",),
        "init=@ar is taken from elsewhere and knows nothing of the codec .* recipe.codec=FOLDER": (f"recipe.ar={WORLDS}/rooms",),
        "every entry of this recipe is taken from elsewhere": tuple(
            f"recipe.{n}={codec}" for n in ("codec", "ar", "cd", "evaluate")
        ),
    }
    for said, overrides in wrong.items():
        with pytest.raises(ConfigError, match=said):
            planned(*overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["only=nope"], "only=nope: the recipe has no such entry, it has codec, ar, cd, evaluate"),
        (["scale=0"], "scale must be a positive number, got 0"),
        (["stage.pairs=3"], "stage.pairs is a setting of no stage of this recipe"),
        (["stage.lrr=1"], r"unknown setting 'stage.lrr' \(did you mean stage.lr\?\)"),
        (["stage.levels=1"], "recipe entry 'cd': stage.levels must be at least 2, got 1"),
        (["stage.beta1=x"], "recipe entry 'codec': stage.beta1: Value 'x'"),
        (["+recipe.x=['stage=codec','codec=@y']"], "recipe entry 'x': codec=@y is no earlier entry of this recipe"),
        (["+recipe.x=['minutes=1']"], "recipe entry 'x': it must name one stage"),
        (["+recipe.x=['stage=codec','stage.nope=1']"], "recipe entry 'x': unknown setting 'stage.nope'"),
        (["recipe={}"], "recipe= cannot be given as a whole: .* or recipe.NAME=FOLDER, add one by .recipe.NAME="),
        (["recipe=nonsense"], "recipe= cannot be given as a whole"),
        (["recipe.ar=3"], r"recipe.ar must be a list of settings, \['stage=...', ...\], or a folder to take it from, got 3"),
        (["recipe.ar=[1]"], "recipe.ar must be a list of settings"),
        (["recipe.ar={a:b}"], "recipe.ar must be a list of settings"),
        (["recipe.ar=[stage=ar_diffusion]"], "cannot read the settings: .*settings of an entry stand in quotes"),
        (["recipe.arr=x"], r"the recipe has no entry 'arr': to add one write \+recipe.arr="),
        (["recipe.ar=nowhere"], r"recipe entry 'ar': there is no folder nowhere: give that of a run or of a world \(settings of"),
        (["recipe.ar=conf"], "recipe entry 'ar': conf holds neither a run nor a world"),
        (["+recipe.x=['stage=dmd','init=@ar','teacher=@ar']"], "recipe entry 'x': teacher=@ar is an autoregressive network"),
        (["+recipe.x=['stage=apex','init=@ar','model.sampler.shift=2']"], "recipe entry 'x': model.sampler.shift does nothing"),
        (["+recipe.x=['stage=causvid','init=@ar','steps=9']"], "recipe entry 'x': the second phase of causvid would never begin"),
        (["name=../x"], "^name=../x is no folder below runs="),
        (["stage=codec", "only=[codec]", "--cfg"], ""),
    ],
)
def test_wrong_recipes_are_explained_before_anything_runs(overrides: list[str], expected: str) -> None:
    register()
    asked = with_recipe(["experiment=tiny", "--cfg", *overrides])
    if not expected:
        explain_settings(asked)
        return
    with pytest.raises(ConfigError, match=expected) as caught:
        explain_settings(asked)
    assert "\n" not in str(caught.value)


def test_a_stage_beside_the_experiment_is_a_single_run() -> None:
    assert with_recipe(["experiment=tiny", "stage=codec"]) == ["experiment=tiny", "stage=codec"]
    assert with_recipe(["experiment=tiny", "-m"]) == ["experiment=tiny", "-m", "stage=recipe", "name=tiny"]
    assert with_recipe(["experiment=tiny", "name=x", "only=a,b"]) == ["experiment=tiny", "name=x", "only=[a,b]", "stage=recipe"]
    with pytest.raises(ConfigError, match="only= and scale= belong to a recipe"):
        jobs.run(dataclasses.replace(planned()[0].config, scale=2.0), Path("/nowhere"))


def test_a_failure_stops_only_those_that_need_it(tmp_path: Path) -> None:
    entries = [dataclasses.replace(e, folder=tmp_path / e.name) for e in planned()]
    done: list[str] = []
    told: list[str] = []

    def do(entry: Entry) -> str | None:
        done.append(entry.name)
        return "it broke" if entry.name == "ar" else None

    other = dataclasses.replace(entries[0], name="other", needs=("codec",))
    failures = run_recipe([*entries, other], [], do, told.append)
    assert done == ["codec", "ar", "other"]
    assert failures == ["ar: it broke", "cd: not started, it needs ar", "evaluate: not started, it needs cd"]
    assert told[0].startswith("[1/5] codec: stage=codec steps=300") and "ar failed: it broke" in told


def test_only_needs_what_the_others_have_left(tmp_path: Path) -> None:
    entries = [dataclasses.replace(e, folder=tmp_path / e.name) for e in planned()]
    done: list[str] = []

    def do(entry: Entry) -> str | None:
        done.append(entry.name)
        return None

    with pytest.raises(ConfigError, match="evaluate needs cd, which has not been trained yet: name it in only=, too"):
        run_recipe(entries, ["codec", "evaluate"], do, print)
    assert not done
    assert run_recipe(entries, ["codec", "ar", "cd", "evaluate"], do, print) == []
    (tmp_path / "cd/export").mkdir(parents=True)
    assert run_recipe(entries, ["evaluate"], do, print) == [] and done[-1] == "evaluate" and len(done) == 5


def test_the_record_of_a_run_survives_a_moved_tree_and_knows_what_changed(tmp_path: Path) -> None:
    config = dataclasses.replace(planned()[2].config, codec=str(tmp_path / "a/codec"), init=str(tmp_path / "a/ar"))
    moved = dataclasses.replace(config, codec=str(tmp_path / "b/codec"), init=str(tmp_path / "b/ar"), minutes=3.0, name="q")
    here, there = record.shaping(config, tmp_path / "a/cd"), record.shaping(moved, tmp_path / "b/cd")
    assert here == there and record.digest(here) == record.digest(there) and here["init"] == "../ar"
    other = record.shaping(dataclasses.replace(config, seed=1), tmp_path / "a/cd")
    assert record.differences(here, other) == ["seed was 0, now 1"]
    assert record.differences({"stage.kind": "codec"}, other) == ["stage was codec, now causal_cd"]
    assert json.loads(json.dumps(here)) == here


def test_changed_settings_are_named_with_what_to_do(tmp_path: Path) -> None:
    def begin(*overrides: str) -> list[Entry]:
        entries = [e for e in planned(*overrides, experiment="compare") if e.name == "self_forcing"]
        return [dataclasses.replace(e, folder=tmp_path / "self_forcing") for e in entries]

    (entry,) = begin()
    record.write_settings(entry.config, entry.folder)
    check_folders(begin("stage.lr=0.5"))  # nothing was trained yet
    (entry.folder / "state").mkdir()
    (entry.folder / "state/step-000000001.pt").touch()
    check_folders(begin())
    place = re.escape(str(entry.folder))
    with pytest.raises(ConfigError, match=rf"{place} was begun .*stage\.lr was .*, now 0\.5\): delete that folder to do it anew"):
        check_folders(begin("stage.lr=0.5"))
    with pytest.raises(
        ConfigError, match=r"\(stage\.pretrain_steps was 500, now 250, scale= multiplies it\): .*the old settings to go on"
    ):
        check_folders(begin("scale=0.5"))


@pytest.mark.slow
def test_a_recipe_runs_once_is_skipped_and_refuses_other_settings(data: Path, tmp_path: Path) -> None:
    asked = words(data, "scale=0.02")
    first = finish(asked, tmp_path)
    assert first.returncode == 0, first.stderr
    home = tmp_path / "runs/tiny"
    assert "[3/4] cd: stage=causal_cd codec=@codec init=@ar" in first.stdout
    finished = {name: json.loads((home / name / "done.json").read_text()) for name in ("codec", "ar", "cd", "evaluate")}
    assert (finished["codec"]["steps"], finished["codec"]["budget"]) == (6, {"steps": 6, "minutes": None})
    assert finished["cd"]["settings"]["init"] == "../ar" and finished["ar"]["flops_per_step"] > 0
    assert (home / "evaluate/evaluation.json").is_file()
    again = finish(asked, tmp_path)
    assert again.returncode == 0 and again.stdout.count("finished before") == 4, again.stderr
    assert {n: json.loads((home / n / "done.json").read_text()) for n in finished} == finished
    changed = finish([*asked, "stage.lr=1e-4"], tmp_path)
    assert changed.returncode == 2 and changed.stderr.count("\n") == 1
    assert "codec was begun with other settings (stage.lr was 0.002, now 0.0001): delete that folder" in changed.stderr
    more = finish([*asked, "scale=0.03", "only=codec"], tmp_path)
    assert more.returncode == 0 and "its budget was raised after 6 steps, goes on" in more.stdout, more.stderr
    assert "warning: codec was trained on since ar was finished" in finish([*asked, "only=ar"], tmp_path).stdout
    second = finish([*asked, "name=second", f"recipe.codec={home}/ar/export", f"recipe.ar={home}/ar", "only=cd"], tmp_path)
    assert second.returncode == 0, second.stderr
    assert f"ar: taken from {home}/ar\n[1/2] cd: stage=causal_cd" in second.stdout
    assert {p.name for p in (tmp_path / "runs/second").iterdir()} == {".hydra", "cd"}


@pytest.mark.slow
def test_interrupted_between_two_runs_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    asked = words(data, "only=codec,ar", "train.checkpoint_steps=5")
    process = subprocess.Popen(asked, cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not list((tmp_path / "runs/tiny/ar/state").glob("step-*.pt")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, (out, err)
    again = finish(asked, tmp_path)
    assert again.returncode == 0 and "codec: stage=codec" in again.stdout and "finished before (300 steps)" in again.stdout
    assert "resumed" in again.stdout and json.loads((tmp_path / "runs/tiny/ar/done.json").read_text())["steps"] == 300


def test_a_sweep_of_recipes_has_a_folder_a_job(data: Path, tmp_path: Path) -> None:
    asked = words(data, "scale=0.01", "seed=0,1", "only=codec", launcher=("-m", "train", "-m"))
    done = finish(asked, tmp_path)
    assert done.returncode == 0, done.stderr
    seeds = [json.loads((tmp_path / f"runs/tiny/{i}/codec/done.json").read_text())["seed"] for i in range(2)]
    assert seeds == [0, 1]


@pytest.mark.slow
def test_two_processes_run_a_recipe(data: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone", "-m", "train")
    done = finish(words(data, "scale=0.02", "only=codec,ar", launcher=launcher), tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("[1/4] codec") == 1 and done.stdout.count("[2/4] ar") == 1
    assert json.loads((tmp_path / "runs/tiny/ar/done.json").read_text())["processes"] == 2


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_in_other_processes_tell_what_failed(data: Path, tmp_path: Path, launcher: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    asked = [*words(data, "stage=codec", "steps=2", "name=s", "model.codec.blocks=-1,1", f"hydra/launcher={launcher}"), "-m"]
    done = finish(asked, tmp_path)
    assert done.returncode == 2, done.stderr
    failed = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(failed) == 1 and "model.codec.blocks=-1" in failed[0] and "codec.blocks lies in 0 to 64, got -1" in failed[0]
    assert (tmp_path / "runs/s/1/done.json").is_file()


def test_a_launcher_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    with pytest.raises(ConfigError, match=r"there is no hydra/launcher=jobilb: choose basic .*pip install -e '.\[sweep\]'"):
        explain_settings(["stage=codec", "hydra/launcher=jobilb", "seed=0,1", "-m"])
    monkeypatch.setattr("hydra.core.plugins.Plugins.discover", lambda self, kind: [])
    with pytest.raises(ConfigError, match=r"hydra/launcher=slurm is not installed: pip install -e '.\[sweep\]'"):
        explain_settings(["stage=codec", "hydra/launcher=slurm", "seed=0,1", "-m"])
