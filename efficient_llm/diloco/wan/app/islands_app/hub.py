"""The hub's side."""

from efficient_llm.diloco.wan.hub_app import app

__all__ = ['app']
