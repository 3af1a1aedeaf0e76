"""The exceptions that mean: the user asked for something that cannot be done, and here is why.

Every error that the package raises on purpose and that is not a bad argument of a Python call (those are
ValueError and TypeError) derives from MHCError. The command line prints it without a traceback.
"""


class MHCError(Exception):
    """A known failure with a message for the user: what was expected, what was found, what to do."""


class CompilerError(MHCError):
    """A compiler is missing, or refused generated code."""


class GradientError(MHCError):
    """A gradient that there is none of: second derivatives, forward mode, calls with out=."""


class MHCWarning(UserWarning):
    """Something that goes on, but should be looked at: a model whose mappings have left their limits."""


class LoweringError(MHCError):
    """A kernel uses something of TileLang that the CPU target does not know."""


class ConversionError(MHCError):
    """Another framework's weights or code that nothing here is equal to, or a state dict with other keys than its."""


class BundleError(MHCError):
    """A bundle of exported kernels that is damaged, made for another machine, or lacks what was asked for."""


class TrustError(MHCError):
    """A kernel cache or bundle that others than this user and root can change: it would run their code."""
