"""An island's side."""

from efficient_llm.diloco.wan.shim import app

__all__ = ['app']
