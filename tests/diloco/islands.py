"""Runs of islands on the smallest text and model."""

import dataclasses
import pathlib
from typing import Any

from efficient_llm.diloco.config import DilocoConfig
from tests import tiny


def config(
  text: pathlib.Path,
  *,
  cache_dir: pathlib.Path | None = None,
  loop: dict[str, Any] | None = None,
  **changes: Any,
) -> DilocoConfig:
  """Two islands, twelve steps, a sync every three; else as `tiny.config`.

  Args:
    text: What is trained on.
    cache_dir: Where its tokens are kept.
    loop: Fields of `loop.LoopConfig`.
    **changes: Fields of `DilocoConfig`.
  """
  plain = tiny.config(text, cache_dir=cache_dir, **(loop or {}))
  fields = {
    field.name: getattr(plain, field.name)
    for field in dataclasses.fields(plain)
    if field.name != 'mesh'
  }
  return DilocoConfig(**{**fields, 'islands': 2, 'sync_period': 3, **changes})
