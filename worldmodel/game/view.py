"""What the window shows now: picks the picture, cards and HUD by the shell's state. Draws only; changes nothing else."""

from __future__ import annotations

import time

import pygame

from worldmodel.game import cards, hud
from worldmodel.game.prompting import takes_prompts
from worldmodel.game.settings import Preview
from worldmodel.game.shell import Shell
from worldmodel.game.theme import ACCENT, GOOD, PAPER, RED, Color
from worldmodel.game.window import Window

HINT_SECONDS = 6.0  # that the first hint stays after the start
REFRESH_SECONDS = 0.25  # between two readings of the numbers, so that they can be read


class View:
    """Draws `shell` into `window`. preview: what is known of the world while it loads."""

    def __init__(self, window: Window, shell: Shell, preview: Preview) -> None:
        self._window, self._shell, self._preview, self._run = window, shell, preview, shell.run
        self._numbers, self._numbers_at = hud.Numbers(), -1.0

    def draw(self) -> None:
        """One whole picture of the window, flipped to the screen."""
        shell, window, generator = self._shell, self._window, self._run.generator
        shell.dirty = False
        toasts = [words for words, _ in shell.toasts]
        if not generator.playing:
            screen = window.begin(dim=70)
            self._draw_loading(screen)
            hud.draw_toasts(screen, toasts[-1:])
        elif shell.screen in ("menu", "help"):
            screen = window.begin(dim=120, blur=True)
            self._draw_card(screen)
            hud.draw_badges(screen, self._badges())
            hud.draw_toasts(screen, toasts[-1:])
        else:
            screen = window.begin()
            self._draw_play(screen)
            if shell.screen == "prompt":
                cards.draw_prompt(screen, shell.line.text)
            hud.draw_toasts(screen, toasts, lift=6.5 if shell.overlay else 8.5 if shell.screen == "prompt" else 0.0)
        window.flip()

    def _draw_loading(self, screen: pygame.Surface) -> None:
        height, width = self._preview.size
        stage = self._run.generator.stage
        compiling = self._run.settings.compile == "on" or stage[0] == "compile"
        stages = ("load", "compile", "warm") if compiling else ("load", "warm")
        words = "the real game" if self._preview.source.startswith("real:") else f"{width} x {height} pixels, dreamed live"
        cards.draw_keys_card(screen, self._preview.spec, self._run.keymap, "The world is being loaded", lift=9)
        cards.draw_loading(screen, self._preview.title or self._preview.name, words, stage, stages, time.perf_counter())

    def _draw_card(self, screen: pygame.Surface) -> None:
        shell, world = self._shell, self._run.generator.world
        if shell.screen == "help":
            more = [("T", "Another prompt")] if takes_prompts(self._run.generator) else []
            cards.draw_keys_card(screen, world.actions if world else None, self._run.keymap, "F1 goes back", more=more)
        else:
            cards.draw_menu(screen, "Paused", self._place(), shell.choices(), shell.selected)

    def _draw_play(self, screen: pygame.Surface) -> None:
        shell, world, keymap = self._shell, self._run.generator.world, self._run.keymap
        hud.draw_numbers(screen, shell.level, self._read_numbers())
        if shell.overlay and world and keymap:
            hud.draw_keys(screen, world.actions, keymap, self._held(), self._turn())
        elif not shell.toasts:
            hint = self._hint()
            hud.draw_toasts(screen, [hint] if hint else [])
        hud.draw_badges(screen, self._badges())

    def _hint(self) -> str:
        """What to do first; goes away once it is understood."""
        shell, run = self._shell, self._run
        if shell.screen == "step":
            return ".  one more step    Space  play on    Esc  quit"
        if run.generator.replay or run.settings.agent or run.generator.world is None or shell.screen == "prompt":
            return ""
        fresh = shell.started is not None and time.perf_counter() - shell.started < HINT_SECONDS
        by_hand = run.seat is not None and run.seat.mode == "player"
        axes = run.generator.world.actions.axes
        if axes and not self._window.grabbed and by_hand and (fresh or shell.presence.touched):
            return f"click to {axes[0].name} with the mouse    F1  all keys    Esc  menu"
        return "F1  all keys    Esc  menu" if fresh and not shell.presence.touched else ""

    def _place(self) -> str:
        generator = self._run.generator
        spawns = generator.world.spawns if generator.world else 1
        places = f"place {generator.spawn + 1} of {spawns}, " if spawns > 1 else ""
        return f"{self._preview.title or self._preview.name}: {places}seed {generator.seed}, frame {generator.frame}"

    def _badges(self) -> list[tuple[str, Color]]:
        generator, seat = self._run.generator, self._run.seat
        found = []
        if self._shell.screen == "step":
            found.append((f"paused at frame {generator.frame}", PAPER))
        if generator.replay is not None:
            found.append((f"replay {generator.frame} / {generator.replay.frames}", GOOD))
        elif seat is not None and seat.mode == "agent":
            found.append(("agent plays, Tab takes over", ACCENT))
        elif seat is not None and seat.mode == "demo":
            found.append(("demo, press any key to play", ACCENT))
        if generator.journal is not None and generator.journal.video is not None:
            found.append(("recording", RED))
        if self._shell.change.busy:
            found.append((f"encoding the prompt{'.' * (1 + int(2 * time.perf_counter()) % 3)}", ACCENT))
        return found

    def _held(self) -> frozenset[str]:
        """Actions of the newest step, by whoever made them, and what a person holds now."""
        mine = self._run.inputs.held() if self._run.inputs else frozenset()
        return self._run.generator.action.buttons | mine

    def _turn(self) -> float:
        """How far the newest step turned the view, as a share of the limit: -1 left to 1 right."""
        generator = self._run.generator
        axes = generator.world.actions.axes if generator.world else ()
        axis = next((a for a in axes if a.source == "mouse_x"), None)
        return generator.action.mouse[0] / axis.limit if axis else 0.0

    def _read_numbers(self) -> hud.Numbers:
        now = time.perf_counter()
        if now - self._numbers_at > REFRESH_SECONDS:
            self._numbers_at = now
            stats, plan, facts = self._run.stats, self._run.generator.plan, self._run.facts()
            target = plan.fps if plan.fps is not None else facts["native_fps"]
            delay, curve = stats.recent_latency(), stats.recent_intervals()
            self._numbers = hud.Numbers(stats.fps(recent=True), target or 0.0, delay["p50"], delay["p95"], curve, self._rows(facts))
        return self._numbers

    def _rows(self, facts: dict[str, object]) -> list[tuple[str, str]]:
        generator = self._run.generator
        engine = f"{facts['engine']}{', compiling' if generator.compiling == 'building' else ''}"
        chunk = [("frames per action", f"{facts['frames_per_action']}")] if facts["frames_per_action"] != 1 else []
        return [
            ("engine", f"{facts['steps']} steps, {engine}" if facts["steps"] else "the real game"),
            *chunk,
            ("device", f"{facts['device']} {facts['dtype']}, {facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"),
            ("place", f"{generator.spawn + 1} of {generator.world.spawns if generator.world else 1}, seed {generator.seed}"),
            ("frame", f"{generator.frame}"),
            ("held", " ".join(sorted(self._held())) or "nothing"),
        ]
