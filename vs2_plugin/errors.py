"""The errors of this package. Commands print them as one line and exit with 2; the Python API raises them.

    Vs2Error
    ├── ModelStringError    a model string that cannot be read, or names something unknown
    ├── PluginError         a plugin that is broken, or two that claim one method name
    ├── TowerError          a CLIP that cannot be loaded, or a site that it does not have
    ├── CheckpointError     an SAE checkpoint that is damaged or belongs to another tower
    │   ├── CheckpointNotFound
    │   ├── CheckpointReplaced
    │   └── HubError        a repository on a hub that cannot be fetched or written
    ├── DataError           a data set, a split or a cache that cannot be used
    ├── SettingError        a setting outside its range
    └── HarnessError        a clip_benchmark that this package cannot work with, or an output it could not write

Every message says what was wrong, with the value, what was expected, and, where there is one, the command
that fixes it.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "CheckpointReplaced",
    "DataError",
    "HarnessError",
    "HubError",
    "ModelStringError",
    "PluginError",
    "SettingError",
    "TowerError",
    "Vs2Error",
    "is_interruption",
]


class Vs2Error(Exception):
    """The base class of this package's errors; catch it to catch them all."""


class ModelStringError(Vs2Error):
    """A model string that cannot be read, or that names an unknown method, option or backbone."""


class PluginError(Vs2Error):
    """A plugin that is broken, or two plugins that claim one method name."""


class TowerError(Vs2Error):
    """A CLIP that cannot be loaded, or a site that its vision tower does not have."""


class CheckpointError(Vs2Error):
    """An SAE checkpoint that is damaged, of an unknown format, or of another tower."""


class CheckpointNotFound(CheckpointError):
    """No SAE checkpoint under that name."""


class CheckpointReplaced(CheckpointError):
    """An SAE checkpoint that another process replaced while it was being read; reading it again helps."""


class HubError(CheckpointError):
    """A repository on a hub that cannot be fetched or written."""


class DataError(Vs2Error):
    """A data set, a split or an activation cache that cannot be used."""


class SettingError(Vs2Error):
    """A setting outside its range."""


class HarnessError(Vs2Error):
    """A clip_benchmark version that is not supported, or an output file that could not be written."""


def is_interruption(error: BaseException | None) -> bool:
    """Return whether an exception is a KeyboardInterrupt (Ctrl-C), or was raised while one was being handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
