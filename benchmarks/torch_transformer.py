"""The project's default model and train step in PyTorch, as a peer to measure.

Same mathematics as `models.transformer` with its Llama-style defaults, written
as a PyTorch user would: fused scaled-dot-product attention, fused AdamW,
fused RMSNorm, and `torch.compile` as an option.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from efficient_llm.models import transformer


class Block(nn.Module):
  """Pre-norm attention and gated MLP."""

  def __init__(self, config: transformer.TransformerConfig):
    super().__init__()
    sizes = config.sizes
    embed, mlp = sizes['embed'], sizes['mlp']
    self.heads, self.head_dim = sizes['heads'], sizes['head_dim']
    width = self.heads * self.head_dim
    self.attention_norm = nn.RMSNorm(embed, eps=config.norm_epsilon)
    self.mlp_norm = nn.RMSNorm(embed, eps=config.norm_epsilon)
    self.query_key_value = nn.Linear(embed, 3 * width, bias=False)
    self.out = nn.Linear(width, embed, bias=False)
    self.gate_up = nn.Linear(embed, 2 * mlp, bias=False)
    self.down = nn.Linear(mlp, embed, bias=False)

  def forward(
    self,
    x: torch.Tensor,
    mask: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
  ) -> torch.Tensor:
    """Runs one layer on [B, T, D]."""
    batch, tokens, _ = x.shape
    qkv = self.query_key_value(self.attention_norm(x))
    qkv = qkv.view(batch, tokens, 3, self.heads, self.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, -1))
    gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
    return x + self.down(functional.silu(gate) * up)


def _rotate(
  x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
  first, second = x.chunk(2, dim=-1)
  return torch.cat(
    (first * cos - second * sin, second * cos + first * sin), dim=-1
  )


class Transformer(nn.Module):
  """Decoder with tied embeddings, rotary positions and packed documents."""

  def __init__(self, config: transformer.TransformerConfig):
    super().__init__()
    self.config = config
    sizes = config.sizes
    self.tokens = nn.Embedding(config.vocab_size, sizes['embed'])
    self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
    self.norm = nn.RMSNorm(sizes['embed'], eps=config.norm_epsilon)
    exponents = torch.arange(0, sizes['head_dim'], 2) / sizes['head_dim']
    self.register_buffer('rates', config.rotary_base**-exponents)
    self.apply(_initialise)

  def forward(
    self,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    segment_ids: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
  ) -> torch.Tensor:
    """Mean cross-entropy over the weighted targets."""
    angles = positions[:, None, :, None] * self.rates
    cos, sin = angles.cos(), angles.sin()
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    mask = (
      same
      & torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    )
    x = self.tokens(tokens)
    for block in self.blocks:
      x = block(x, mask, cos, sin)
    logits = self.norm(x) @ self.tokens.weight.T
    losses = functional.cross_entropy(
      logits.flatten(0, 1), targets.flatten(), reduction='none'
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def _initialise(module: nn.Module) -> None:
  if isinstance(module, nn.Linear):
    nn.init.normal_(module.weight, std=module.in_features**-0.5)
  elif isinstance(module, nn.Embedding):
    nn.init.normal_(module.weight, std=0.02)


class Trainer:
  """AdamW, gradient clipping and a warm-up cosine schedule around the model."""

  def __init__(
    self,
    config: transformer.TransformerConfig,
    *,
    learning_rate: float,
    num_steps: int,
    compiled: bool,
  ):
    torch.manual_seed(0)
    self.model = Transformer(config)
    matrices = [p for p in self.model.parameters() if p.ndim > 1]
    vectors = [p for p in self.model.parameters() if p.ndim == 1]
    self.optimizer = torch.optim.AdamW(
      [
        {'params': matrices, 'weight_decay': 0.1},
        {'params': vectors, 'weight_decay': 0.0},
      ],
      lr=learning_rate,
      betas=(0.9, 0.95),
      fused=True,
    )
    self.schedule = torch.optim.lr_scheduler.LambdaLR(
      self.optimizer,
      lambda step: (
        min(1.0, (step + 1) / 10)
        * 0.5
        * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
      ),
    )
    self.loss = torch.compile(self.model) if compiled else self.model

  def step(self, batch: Mapping[str, np.ndarray]) -> float:
    """One update; returns the loss."""
    names = ('tokens', 'positions', 'segment_ids', 'targets', 'loss_weights')
    inputs = [torch.from_numpy(batch[name]) for name in names]
    inputs[0], inputs[3] = inputs[0].long(), inputs[3].long()
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.loss(*inputs)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    self.schedule.step()
    return float(loss.detach())
