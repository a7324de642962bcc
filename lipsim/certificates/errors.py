"""The error of this package; here, since certificates use nothing from other rooms."""


class LipsimError(ValueError):
    """What was given cannot be used: the message says what was expected, what was got and what to do.

    Everything here that refuses an argument, a file or data raises this class or one of its own below it, so that a
    caller, and the command line first, can tell such a refusal from a fault of the code.
    """
