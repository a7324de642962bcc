"""The error that this package raises; its home is the lowest room, where certificates can raise it too."""

from lipsim.certificates.errors import LipsimError

__all__ = ["LipsimError"]
