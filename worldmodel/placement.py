"""Where the parts of a video world live and in which number type: decided from sizes, before anything is loaded. No torch.

Network and cache share a device. The decoder is with them, or on the CPU where they leave it no room. The encoder of a start
picture is loaded, used and let go before the network comes. The text encoder, which only a new prompt needs, takes what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from worldmodel.amounts import megabytes
from worldmodel.errors import ConfigError, DeviceError

ROOM = 10**9  # bytes left free: workspaces of libraries, fragments, the window. Assumed, not measured
HELD = 3  # steps whose pictures are in the CPU's memory: those being made, waiting and shown
MAKING = 9  # bytes of a value of a picture while it is made: twice as float32, and as the byte that it becomes
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
DECODERS = ("auto", "gpu", "cpu")


@dataclass(frozen=True)
class Sizes:
    """What a video world takes, in bytes, where a number has two of them; float32 takes twice that.

    network, decoder: weights. latent: keys and values of one latent; window of them are kept, at least `least`. texts: keys and
    values of a prompt. a_pass, decoding: what is alive meanwhile, noise included. The others are not scaled: encoder (weights and
    work in float32; 0: no start picture), text_file and text_layer (of the text encoder; 0: it is not here), pictures (of a step).
    """

    network: int
    decoder: int
    latent: int
    window: int
    least: int
    texts: int
    a_pass: int
    decoding: int
    encoder: int = 0
    text_file: int = 0
    text_layer: int = 0
    pictures: int = 0


@dataclass(frozen=True)
class Machine:
    """device: ``cuda``, ``mps`` or ``cpu``. free, total: bytes of its memory, None where the system does not tell; ram_free,
    ram: of the CPU's. dtype, cpu_dtype: in which networks run fastest there."""

    device: str
    free: int | None
    total: int | None
    ram_free: int | None
    ram: int | None
    dtype: str
    cpu_dtype: str


@dataclass(frozen=True)
class Placement:
    """The decisions. decoder, encoder, text: devices. keep_text: the text encoder stays there once a prompt has needed it.

    lines: the reasons, for a person.
    """

    device: str
    dtype: str
    decoder: str
    decoder_dtype: str
    encoder: str
    text: str
    keep_text: bool
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """Network in `dtype`, decoder on `decoder`."""

    need: Sizes
    here: Machine
    dtype: str
    decoder: str

    @property
    def apart(self) -> bool:
        """Whether the decoder is on another device."""
        return self.decoder != self.here.device

    @property
    def decoder_dtype(self) -> str:
        return self.here.cpu_dtype if self.apart else self.dtype

    @property
    def decoding(self) -> int:
        return self.decoding_in(self.decoder_dtype)

    def decoding_in(self, dtype: str) -> int:
        return self._scaled(self.need.decoder + self.need.decoding, dtype) + MAKING * self.need.pictures

    @property
    def cache(self) -> int:
        return self._scaled(self.need.latent * self.need.window, self.dtype)

    @property
    def network(self) -> int:
        return self._scaled(self.need.network, self.dtype)

    @property
    def work(self) -> int:
        return self._scaled(self.need.texts + self.need.a_pass, self.dtype)

    @property
    def pictures(self) -> int:
        """Finished ones, on the CPU."""
        return HELD * self.need.pictures

    @property
    def taken(self) -> int:
        """Bytes on the network's device."""
        parts = self.network + self.cache + self.work + (0 if self.apart else self.decoding)
        return parts + (self.pictures if self.here.device == "cpu" else 0)

    @property
    def aside(self) -> int:
        """Bytes on the CPU beside another device."""
        if self.here.device == "cpu":
            return 0
        return self.pictures + (self.decoding + ROOM if self.apart else 0)

    @property
    def lacking(self) -> int:
        """Bytes that are missing there; at most 0 if it fits."""
        return 0 if self.here.free is None else self.taken + ROOM - self.here.free

    @property
    def fits(self) -> bool:
        return self.lacking <= 0 and (self.here.ram_free is None or self.aside <= self.here.ram_free)

    @property
    def fitting_window(self) -> int:
        """The longest cache that there is room for, in latents."""
        return self.need.window - max(0, -(-self.lacking // self._scaled(self.need.latent, self.dtype)))

    @staticmethod
    def _scaled(count: int, dtype: str) -> int:
        return count * WIDTHS[dtype] // 2


def place(name: str, need: Sizes, here: Machine, decoder: str = "auto", dtype: str = "") -> Placement:
    """Decide for the world `name`. decoder: ``gpu`` and ``cpu`` leave no choice. dtype: of the network, "" = the best that fits.

    Raises ConfigError for another word, DeviceError where the world does not fit: what is missing, and what would help.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"the decoder's place is one of {', '.join(DECODERS)}, got {decoder!r}")
    if decoder == "gpu" and here.device == "cpu":
        raise DeviceError(
            "the decoder cannot be on a GPU while the network is on the CPU: leave out --decoder gpu, or --device cpu"
        )
    plans = [_Plan(need, here, kind, at) for at in _decoders(here, decoder) for kind in _types(here, dtype)]
    chosen = next((plan for plan in plans if plan.fits), None)
    if chosen is None:
        raise DeviceError(_shortage(name, plans, decoder))
    left = None if here.free is None else here.free - ROOM - chosen.taken
    encoder = _encoder(name, need, here)
    text, keep = _text(need, here, left)
    lines = (
        _free_line(here),
        *_network_lines(chosen, plans[0]),
        *([_encoder_line(need, here, encoder)] if need.encoder else []),
        _text_line(need, here, text, keep, left),
    )
    return Placement(here.device, chosen.dtype, chosen.decoder, chosen.decoder_dtype, encoder, text, keep, lines)


def _types(here: Machine, wanted: str) -> Iterator[str]:
    """Number types to try, the fastest first; half the bytes are the way out where float32 does not fit."""
    yield wanted or here.dtype
    if not wanted and here.dtype == "float32":
        yield "bfloat16"


def _decoders(here: Machine, wanted: str) -> Iterator[str]:
    if wanted != "cpu" or here.device == "cpu":
        yield here.device
    if wanted != "gpu" and here.device != "cpu":
        yield "cpu"


def _encoder(name: str, need: Sizes, here: Machine) -> str:
    """Device of a start picture's encoder. Raises DeviceError if it has no room anywhere."""
    for device, free in ((here.device, here.free), ("cpu", here.ram_free)):
        if not need.encoder or free is None or need.encoder + ROOM <= free:
            return device
    raise DeviceError(
        f"the encoder of {name}'s start picture needs {_words(need.encoder + ROOM)} of memory, where {_words(here.ram_free)} "
        "of the CPU's are free: leave out --image, or close other programs"
    )


def text_alone(here: Machine, layer: int) -> str:
    """Device of the text encoder while nothing else is loaded. layer: bytes of its largest layer."""
    return _text_device(here, layer, None if here.free is None else here.free - ROOM)


def _text_device(here: Machine, layer: int, left: int | None) -> str:
    """Read layer by layer, the next comes before the last has gone."""
    return "cpu" if left is None or left < 2 * layer + ROOM else here.device


def _text(need: Sizes, here: Machine, left: int | None) -> tuple[str, bool]:
    """Device of the text encoder, and whether it stays."""
    device = _text_device(here, need.text_layer, left)
    return device, device != "cpu" and left is not None and left >= need.text_file + ROOM


def _shortage(name: str, plans: list[_Plan], decoder: str) -> str:
    """One sentence: the shortfall of the most modest plan, and what would mend it."""
    least = min(plans, key=lambda plan: (max(plan.lacking, 0), plan.aside))
    here, need = least.here, least.need
    if least.lacking <= 0:  # it is the decoder, or what it makes, that has no room on the CPU
        what, size = ("decoder needs", least.decoding) if least.apart else ("pictures need", least.pictures)
        return (
            f"{name}'s {what} {_words(size)} of the CPU's memory, where {_words(here.ram_free)} are free: "
            "close other programs" + (", or give --decoder auto" if decoder == "cpu" else "")
        )
    parts = [f"network {_words(least.network)}", f"cache of {need.window} latents {_words(least.cache)}"]
    parts += [f"a pass {_words(least.work)}"] + ([] if least.apart else [f"decoder {_words(least.decoding)}"])
    parts += [f"pictures {_words(least.pictures)}"] if here.device == "cpu" and need.pictures else []
    ways = [f"remember fewer latents with --window {least.fitting_window}"] if least.fitting_window >= need.least else []
    if decoder == "gpu" and least.lacking <= least.decoding:
        ways.append("leave out --decoder gpu")
    if here.device != "cpu" and _on_cpu(least).fits:
        ways.append("play on the CPU, slowly, with --device cpu")
    ways.append("close other programs, or take a machine with more memory")
    return (
        f"{name} needs {_words(least.taken + ROOM)} of {_memory(here)} ({', '.join(parts)}, {_words(ROOM)} to spare), "
        f"{_words(here.free)} of {_words(here.total)} are free, {_words(least.lacking)} are missing: {'; or '.join(ways)}"
    )


def _on_cpu(plan: _Plan) -> _Plan:
    """The most modest plan without a GPU."""
    here = plan.here
    return _Plan(
        plan.need, Machine("cpu", here.ram_free, here.ram, here.ram_free, here.ram, "bfloat16", "bfloat16"), "bfloat16", "cpu"
    )


def _memory(here: Machine) -> str:
    return "memory" if here.device == "cpu" else "GPU memory"


def spoken(device: str) -> str:
    """A device in words."""
    return "the CPU" if device == "cpu" else "the GPU"


def _free_line(here: Machine) -> str:
    if here.free is None:
        return f"how much {_memory(here)} is free is not known here: nothing was checked"
    line = f"{_words(here.free)} of {_words(here.total)} of {_memory(here)} are free"
    if here.device == "cpu" or here.ram_free is None:
        return line
    return f"{line}, {_words(here.ram_free)} of {_words(here.ram)} of the CPU's"


def _network_lines(chosen: _Plan, first: _Plan) -> list[str]:
    need, device = chosen.need, spoken(chosen.here.device)
    line = f"network ({_words(chosen.network)}), cache of {need.window} latents ({_words(chosen.cache)}) and a pass's work "
    line += f"({_words(chosen.work)}) on {device} in {chosen.dtype}"
    if chosen.dtype != first.dtype:
        line += f": {first.dtype}, which is faster here, would take {_words(first.taken)}"
    if not chosen.apart:
        return [line, f"decoder ({_words(chosen.decoding)}) on {device}, too"]
    with_it = chosen.taken + chosen.decoding_in(chosen.dtype)
    lacking = 0 if chosen.here.free is None else with_it + ROOM - chosen.here.free
    why = f"{device} lacks {_words(lacking)} for it" if lacking > 0 else "asked for"
    return [line, f"decoder ({_words(chosen.decoding)}) on the CPU in {chosen.decoder_dtype}, slower: {why}"]


def _encoder_line(need: Sizes, here: Machine, device: str) -> str:
    why = "" if device == here.device else f", {spoken(here.device)} has no room for it"
    return f"start picture's encoder ({_words(need.encoder)}) on {spoken(device)}{why}; let go before the network is loaded"


def _text_line(need: Sizes, here: Machine, device: str, keep: bool, left: int | None) -> str:
    if not need.text_file:
        return "text encoder: not on this machine, so prompts are those that are known here"
    what = f"text encoder ({_words(need.text_file)}) on {spoken(device)}"
    if keep:
        return f"{what}, loaded with the first new prompt and kept: {_words(left)} are left there"
    why = "" if here.device == "cpu" or left is None else f": {_words(max(left, 0))} are left on {spoken(here.device)}"
    return f"{what}, read layer by layer for a new prompt and let go{why}"


def _words(count: int | None) -> str:
    return "?" if count is None else megabytes(count)
