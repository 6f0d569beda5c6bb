"""The version of both packages, read by setup.cfg too."""

__version__ = "0.2.0"
