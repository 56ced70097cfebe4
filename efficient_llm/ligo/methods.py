"""Every growth method as a setting of the one operator.

`METHODS` lists them. What a method says of width only, or of depth only, is
completed by the usual choice for the other (new width that starts at zero,
layers stacked), as most pairs grow in both. Methods of several stages start
from the operator named here and add their schedule.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.ligo import depth, pair, width
from efficient_llm.ligo import operator as operator_lib
from efficient_llm.ligo.config import MethodConfig
from efficient_llm.models import transformer
from efficient_llm.models.config import TransformerConfig

METHODS: dict[str, MethodConfig] = {
  # Gong et al. 2019; G_stack (Du et al. 2024) is the same at another time.
  'stack': MethodConfig(),
  'interpolate': MethodConfig(depth='interpolate'),
  # Yang et al. 2020, MSLT: a stage of it.
  'top': MethodConfig(depth='top'),
  # Kim et al. 2023, SOLAR.
  'overlap': MethodConfig(depth='overlap'),
  # Progressive training from one layer or none (arXiv:2511.04981).
  'append': MethodConfig(depth='append'),
  # Wu et al. 2024, LLaMA-Pro; width without loss beside it.
  'identity': MethodConfig(depth='identity'),
  # Chen et al. 2016, Net2Net; FPI in bert2BERT (Chen et al. 2022).
  'net2net': MethodConfig(width='copy', copies='random'),
  'aki': MethodConfig(width='copy', copies='random', advanced=True),
  # Samragh et al. 2024, HyperCloning, which adds noise that sums to zero.
  'clone': MethodConfig(width='copy'),
  'noisy_clone': MethodConfig(width='copy', noise=1.0),
  # Shen et al. 2022, staged training: doubled width, layers that add nothing.
  'staged': MethodConfig(depth='identity', width='copy'),
  # Wang et al. 2023, LEMON.
  'lemon': MethodConfig(depth='identity', width='average'),
  # Wei et al. 2016: the small model in a corner of a random large one.
  'direct_copy': MethodConfig(width='fresh'),
  # Training from nothing, for knowledge inheritance (Qin et al. 2022).
  'random': MethodConfig(kept=False),
  # The start of LiGO's released code (README: stackbert_noisy, rand).
  'ligo_released': MethodConfig(width='mix', split=False, depth_noise=0.03),
}


def get(name: str) -> MethodConfig:
  """A method's setting.

  Raises:
    ValueError: If there is no such name; lists the names there are.
  """
  if name not in METHODS:
    raise ValueError(
      f'Unknown method {name!r}; choose one of {", ".join(METHODS)}.'
    )
  return METHODS[name]


def build(
  method: MethodConfig,
  small: TransformerConfig,
  large: TransformerConfig,
  *,
  seed: int = 0,
) -> operator_lib.Operator:
  """The method's operator for a pair, before anything is learned.

  Args:
    method: How it begins.
    small: The model that is trained.
    large: The model that is wanted.
    seed: Of copies, mixtures, noise and fresh weights.
  Raises:
    ValueError: If the pair or the method breaks a rule.
  """
  method.validate()
  pair.check(small, large)
  rng = np.random.default_rng(seed)
  if not method.kept:
    return operator_lib.Operator((), transformer.init(large, _key(rng)))
  axes = width.grown_axes(method, small, large, rng)
  layers = depth.matrices(method, small, large, rng)
  used = {
    name for maps in operator_lib.leaf_maps(small).values() for name in maps
  }

  def term(
    maps: dict[str, np.ndarray], depths: dict[str, np.ndarray]
  ) -> operator_lib.Term:
    kept = {name: x for name, x in maps.items() if name in used}
    as_arrays: Any = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float32), (kept, depths)
    )
    return operator_lib.Term(*as_arrays)

  if method.advanced:
    terms = (
      term(width.maps(axes, only='old'), layers),
      term(width.maps(axes, only='new'), depth.from_above(layers)),
    )
  else:
    terms = (term(width.maps(axes), layers),)
  return operator_lib.Operator(terms, _added(method, small, large, axes, rng))


def _added(
  method: MethodConfig,
  small: TransformerConfig,
  large: TransformerConfig,
  axes: dict[str, width.Grown],
  rng: np.random.Generator,
) -> Any:
  """Fresh weights and noise, in the large model's structure."""
  has_free = method.fresh and method.width in ('zero', 'average')
  is_wider = axes and (has_free or method.noise or method.width == 'fresh')
  num_old = small.num_layers
  is_longer = method.depth == 'append' and large.num_layers > num_old
  if not is_wider and not is_longer:
    return None
  start = transformer.init(large, _key(rng))
  names = operator_lib.leaf_maps(small)

  def added(path: Any, leaf: jax.Array) -> jax.Array:
    keys = operator_lib.keys_of(path)
    found = jnp.zeros_like(leaf)
    if is_wider and keys[-1] not in ('scale', 'bias'):
      found = of_width(names['/'.join(keys)], leaf)
    if is_longer and keys[0] == 'layers':
      found = jnp.concatenate([found[:num_old], leaf[num_old:]])
    return found

  def of_width(maps: tuple[str | None, ...], leaf: jax.Array) -> jax.Array:
    if method.width == 'fresh':
      return leaf * width.is_new(axes, maps, leaf.shape)
    if method.noise:
      return method.noise * width.without_sum(axes, maps, leaf)
    return leaf * width.is_free(axes, maps, leaf.shape)

  return jax.tree_util.tree_map_with_path(added, start)


def _key(rng: np.random.Generator) -> jax.Array:
  return jax.random.key(int(rng.integers(2**31)))


def loss_of_function(
  method: MethodConfig, small: TransformerConfig, large: TransformerConfig
) -> str | None:
  """Why the grown model is not the small one's function; None if it is.

  With the small model's epsilon scaled by small over large width where width
  starts at zero or at the average, as then the variance is.
  """
  if not method.kept:
    return 'nothing of the small model is kept'
  if large.num_layers > small.num_layers:
    if method.depth == 'append':
      return 'layers behind the small model are random'
    if method.depth != 'identity':
      return f'depth={method.depth!r} repeats layers'
    if small.norm_placement == 'post':
      return 'a layer behind a post-norm cannot add nothing'
  grown = [
    name
    for name in ('embed', 'mlp', 'heads', 'kv_heads')
    if large.sizes[name] > small.sizes[name]
  ]
  if not grown:
    return None
  if method.width in ('mix', 'fresh'):
    return f'width={method.width!r} reads what is new'
  if method.advanced and small.num_layers > 1:
    return 'columns come from another layer'
  if method.width == 'copy' and not method.split:
    return 'copies are read in full'
  if 'embed' not in grown:
    return None
  is_post = small.norm_placement == 'post'
  if is_post and small.tie_embeddings and not small.mlm_head:
    return 'no norm of its own stands before the tied head'
  if method.width == 'average' and small.mlm_head:
    return 'the head averages before its activation'
  if method.width == 'average' and small.layer_scale is not None:
    return 'a mean is taken before the gains of its places'
  if method.width == 'copy':
    if large.embed_dim % small.embed_dim or method.copies == 'random':
      return 'norms see units by how often they are copied'
    return None
  if is_post:
    return 'a post-norm does not leave new width at rest'
  if method.width == 'zero' and small.norm == 'layer':
    return 'a mean over new width is another mean'
  if method.width == 'average' and small.norm == 'rms':
    return 'an RMS norm does not take the mean off'
  return None
