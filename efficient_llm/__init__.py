"""Train language models cheaper: the shared core and the techniques on it."""

__version__ = '0.1.0'
