"""The one family of errors that reaches a user: each message is a sentence that names the fix."""

from __future__ import annotations


class WorldModelError(Exception):
    """Base of every error a person can cause or mend. Doors print the message alone and exit with 2."""


class ConfigError(WorldModelError):
    """A description of a world, an action or a run does not make sense."""


class CheckpointError(WorldModelError):
    """Weights or a world folder are missing, damaged or do not fit the configuration."""


class DataError(WorldModelError):
    """An episode or data set is missing, damaged or of another version."""


class DeviceError(WorldModelError):
    """The asked-for device cannot be used here."""


class HubError(WorldModelError):
    """A repository on the hub cannot be reached, read or written. unreachable: no answer, rather than a no."""

    def __init__(self, message: str, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable
