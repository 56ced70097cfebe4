"""Tiny pairs of every architecture, grown in depth, in width and in both."""

import dataclasses

from efficient_llm.models.config import TransformerConfig
from tests.models import architectures

DOUBLE, HALF_MORE = 2.0, 1.5


def large(
  name: str, *, width: float = 1.0, num_layers: int = 2
) -> TransformerConfig:
  """The tiny model of an architecture, of another width and depth.

  Args:
    name: Of `architectures.ALL`, two layers deep.
    width: Times as wide; heads are more, not larger.
    num_layers: How deep.
  """
  small = architectures.ALL[name]
  kv_heads = small.num_kv_heads
  if kv_heads is not None and (kv_heads * width) % 1 == 0:
    kv_heads = int(kv_heads * width)
  return dataclasses.replace(
    small,
    num_layers=num_layers,
    embed_dim=int(small.embed_dim * width),
    num_heads=int(small.num_heads * width),
    num_kv_heads=kv_heads,
    head_dim=small.sizes['head_dim'],
    mlp_dim=int(small.sizes['mlp'] * width),
  )
