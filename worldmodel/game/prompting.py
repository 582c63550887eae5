"""Another prompt while playing: the line that a person types, and the change itself, which is prepared behind the game.

The world offers `takes_prompts`, `find_prompt(text)` (may take minutes, any thread) and `add_prompt(found)`, which returns the
number of the new starting place. No pygame here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from worldmodel.errors import WorldModelError
from worldmodel.game.generator import Generator

MOST = 1000  # characters; more than the text encoder reads


def takes_prompts(generator: Generator) -> bool:
    """Whether the world's prompt can be changed now."""
    return bool(getattr(generator.world, "takes_prompts", False)) and generator.replay is None


class PromptLine:
    """A line of text under the keys. Written from its end only."""

    def __init__(self) -> None:
        self.text = ""

    def insert(self, text: str) -> None:
        """What was typed; anything that cannot be printed is left out."""
        self.text = (self.text + "".join(c for c in text if c.isprintable()))[:MOST]

    def rub_out(self) -> None:
        """Take the last character back."""
        self.text = self.text[:-1]


class PromptChange:
    """Looks a prompt up, or has it encoded, in a thread of its own; the game goes on and dreams of it as soon as it is there.

    tell: shows a sentence in the window, from any thread.
    """

    def __init__(self, generator: Generator, tell: Callable[[str], None]) -> None:
        self._generator, self._tell = generator, tell
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a prompt is being prepared."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self, text: str) -> None:
        """Change to `text`, in the end. One at a time: while one is prepared, others are refused."""
        if self.busy:
            self._tell("one prompt is being encoded already: wait for it")
            return
        self._thread = threading.Thread(target=self._prepare, args=(text,), name="prompt", daemon=True)
        self._thread.start()

    def _prepare(self, text: str) -> None:
        world: Any = self._generator.world
        try:
            found = world.find_prompt(text)
        except Exception as error:  # the game goes on, whatever it was
            known = isinstance(error, WorldModelError)
            sentence = str(error) if known else f"the prompt could not be encoded: {type(error).__name__} {error}"
            print(f"note: {sentence}", file=sys.stderr)  # whole; the window may be too narrow for it
            self._tell(sentence)
            return
        self._generator.command(lambda: self._apply(text, found))
        self._tell(f"now: {text}")

    def _apply(self, text: str, found: Any) -> None:
        """Between two steps: dream of `text` from now on; it becomes the place that a reset goes to."""
        world: Any = self._generator.world
        self._generator.spawn = world.add_prompt(found)
        self._generator.note("prompt", text=text)
