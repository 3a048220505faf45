"""What can go wrong by a user's hand, as exceptions. Every message names the thing, the value and the way out.

All derive from `SymOptError`, a `ValueError`: a program that embeds the library catches one class, and the command
line prints the message without a traceback.
"""


class SymOptError(ValueError):
    """The base of every error that bad input causes."""


class ConfigError(SymOptError):
    """An option, rule, role, scale or stack that does not exist or does not fit the others."""


class TaxonomyError(SymOptError):
    """Blocks that do not cover a module exactly once, or a layout that does not fit a shape."""


class GradientError(SymOptError):
    """A gradient no update can be computed from: sparse, complex or not finite."""


class CheckpointError(SymOptError):
    """A checkpoint that is missing, or that belongs to another architecture or stack."""


class DataError(SymOptError):
    """Text, a token shard or a cache folder that cannot be used."""


class ProfileError(SymOptError):
    """A trace or a record of a profile that cannot be read, written or compared."""
