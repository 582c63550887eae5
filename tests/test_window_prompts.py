"""Another prompt, typed while playing: applied, recorded, replayed, refused, and never waited for."""

import subprocess
import sys
from pathlib import Path

from tests.box_world import BoxWorld, PromptBoxWorld, run
from tests.window_person import Person, played


def test_a_prompt_is_typed_applied_recorded_and_replayed(monkeypatch, tmp_path, capsys):
    def script(person: Person) -> None:
        generator, shell = person.loop.run.generator, person.loop.shell
        person.frames(3)
        person.down("KeyW")  # held until the line opens
        person.frames(2)
        person.tap("KeyT")
        person.until(lambda: shell.screen == "prompt" and generator.paused)
        person.write("17e")
        for code in ("KeyE", "F8", "Tab"):  # they are text now, or nothing
            person.tap(code)
        person.tap("Backspace")
        person.write("7\n")
        person.until(lambda: shell.line.text == "177")
        assert shell.screen == "prompt" and generator.spawn == 0
        person.tap("Enter")
        person.until(lambda: generator.world._red == 177)
        person.frames(3)
        assert shell.screen == "play" and any("now: 177" in words for words, _ in shell.toasts)
        person.tap("KeyT")
        person.until(lambda: shell.screen == "prompt")
        person.write("8")
        person.tap("Escape")  # thought better of it
        person.until(lambda: shell.screen == "play")
        person.frames(2)
        person.tap("Enter")  # again, from the beginning of the new prompt
        person.until(lambda: generator.world._index < 3 and generator.spawn == 3)
        person.frames(2)

    assert Person(monkeypatch, tmp_path, PromptBoxWorld).play(script) == 0
    path, ops = played(tmp_path).path, played(tmp_path).ops
    (at,) = [i for i, op in enumerate(ops) if op.kind == "prompt"]
    assert ops[at].text == "177" and [op.spawn for op in ops if op.kind == "reset"] == [0, 3]
    assert not any("use" in op.action.buttons for op in ops if op.action)
    assert run(PromptBoxWorld, replay=path) == 0
    assert f"exact: {ops[-1].frame} frames" in capsys.readouterr().out
    assert run(BoxWorld, replay=path) == 2
    assert "changes the prompt, but this world takes none" in capsys.readouterr().err
    path.write_text(path.read_text().replace('"text": "177"', '"text": "178"'))
    assert run(PromptBoxWorld, replay=path) == 1
    assert f"diverged at frame {ops[at].frame + 1}" in capsys.readouterr().out


def test_the_game_goes_on_while_a_prompt_is_encoded_and_when_it_cannot_be(monkeypatch, tmp_path, capsys):
    def script(person: Person) -> None:
        generator, shell = person.loop.run.generator, person.loop.shell

        def ask(words: str) -> None:
            person.tap("KeyT")
            person.until(lambda: shell.screen == "prompt")
            person.write(words)
            person.tap("Enter")
            person.until(lambda: shell.screen == "play")

        person.frames(2)
        ask("9")
        person.until(lambda: shell.change.busy)
        person.frames(3)
        assert shell.change.busy and generator.world._red == 0
        assert any(words.startswith("encoding the prompt") for words, _ in person.loop._view._badges())
        ask("10")
        person.until(lambda: any("wait for it" in words for words, _ in shell.toasts))
        person.until(lambda: generator.world._red == 9)
        ask("a castle")
        person.until(lambda: any("no embedding of 'a castle' is here" in words for words, _ in shell.toasts))
        person.frames(3)
        assert generator.world._red == 9
        person.tap("KeyT")
        person.until(lambda: shell.screen == "prompt")
        person.tap("Enter")  # nothing was typed
        person.until(lambda: shell.screen == "play")
        assert not shell.change.busy

    assert Person(monkeypatch, tmp_path, lambda: PromptBoxWorld(0.6)).play(script) == 0
    assert "note: no embedding of 'a castle' is here" in capsys.readouterr().err
    assert [op.text for op in played(tmp_path).ops if op.kind == "prompt"] == ["9"]


def test_closing_the_window_does_not_wait_for_the_text_encoder(tmp_path):
    script = """
import sys, pytest
from pathlib import Path
from tests.box_world import PromptBoxWorld
from tests.window_person import Person
def script(person):
    person.frames(2)
    person.tap("KeyT")
    person.until(lambda: person.loop.shell.screen == "prompt")
    person.write("5")
    person.tap("Enter")
    person.until(lambda: person.loop.shell.change.busy)
    person.frames(3)
sys.exit(Person(pytest.MonkeyPatch(), Path(sys.argv[1]), lambda: PromptBoxWorld(60.0)).play(script))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and "replay: " in done.stdout, done.stderr
    assert played(tmp_path).frames >= 5


def test_worlds_without_prompts_do_not_offer_one(monkeypatch, tmp_path):
    def script(person: Person) -> None:
        shell = person.loop.shell
        person.frames(2)
        person.tap("KeyT")
        person.frames(2)
        assert shell.screen == "play" and "prompt" not in [choice.name for choice in shell.choices()]

    assert Person(monkeypatch, tmp_path).play(script) == 0
