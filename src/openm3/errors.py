"""Every exception openm3 raises on purpose, in one tree.

    OpenM3Error                  the root: the command line prints its message and exits with code 2
    ├── ConfigError              a config with impossible, contradictory or unsupported fields
    ├── CheckpointError          files missing, torn, of a foreign architecture or of the wrong shape
    ├── PromptError              a prompt or conversation that cannot be run: too long, empty, ids out of range
    ├── DocumentError            a document that cannot be read: missing, empty, binary
    ├── BusyError                an engine that has as many requests waiting as it takes
    ├── EngineError              a step of an engine failed, and it has stopped
    └── UnsupportedError         no implementation of an operator supports a call; lists every reason

All but the last three are also ValueError: the caller passed something wrong; the message says what would be right.
"""


class OpenM3Error(Exception):
    """Root of every deliberate openm3 error."""


class ConfigError(OpenM3Error, ValueError):
    """A model or engine configuration that cannot be used."""


class CheckpointError(OpenM3Error, ValueError):
    """A checkpoint that cannot be read or written."""


class PromptError(OpenM3Error, ValueError):
    """A prompt or conversation that cannot be run."""


class DocumentError(OpenM3Error, ValueError):
    """A document that cannot be read."""


class BusyError(OpenM3Error):
    """Too many requests wait already: the same one may be taken later."""


class EngineError(OpenM3Error):
    """A step failed: the engine has stopped, and refuses what comes later."""


class UnsupportedError(OpenM3Error, NotImplementedError):
    """No implementation of an operator supports the call."""
