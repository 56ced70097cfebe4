import math
from typing import Any

import hypothesis
import jax
import pytest
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

from efficient_llm import sharding
from efficient_llm.models import transformer
from efficient_llm.typing import LogicalAxes
from tests import simulated_devices
from tests.models import architectures


def _mesh(**sizes: int) -> AbstractMesh:
  names = sharding.MESH_AXES
  return AbstractMesh(tuple(sizes.get(name, 1) for name in names), names)


def _spec(*names: str | None) -> PartitionSpec:
  return sharding.DEFAULT_RULES.spec(names, sharding.MESH_AXES)


def test_rules_name_only_axes_of_the_mesh() -> None:
  used = {
    axis for axes in sharding.DEFAULT_RULES.table.values() for axis in axes
  }
  assert used == set(sharding.MESH_AXES)


def test_rules_name_only_axes_of_a_model_and_of_its_batch() -> None:
  known = {'batch', 'island', *transformer.TransformerConfig().sizes}
  assert set(sharding.DEFAULT_RULES.table) <= known


def test_a_kernel_is_shared_along_both_sides() -> None:
  assert _spec('layers', 'embed', 'mlp') == PartitionSpec(
    None, 'fsdp', 'tensor'
  )
  assert _spec('heads', 'head_dim', 'embed') == PartitionSpec(
    'tensor', None, 'fsdp'
  )
  assert _spec('vocab', 'embed') == PartitionSpec('tensor', 'fsdp')


def test_a_batch_is_shared_over_two_mesh_axes() -> None:
  assert _spec('batch', None) == PartitionSpec(('data', 'fsdp'), None)


def test_a_mesh_axis_is_used_once() -> None:
  assert _spec('embed', 'embed') == PartitionSpec('fsdp', None)
  assert _spec('batch', 'embed') == PartitionSpec(('data', 'fsdp'), None)
  assert _spec('embed', 'batch') == PartitionSpec('fsdp', 'data')


def test_rules_about_axes_that_the_mesh_lacks_do_not_apply() -> None:
  spec = sharding.DEFAULT_RULES.spec(('embed', 'mlp'), ('tensor',))
  assert spec == PartitionSpec(None, 'tensor')


_SIZE = st.integers(1, 12)


@hypothesis.given(_SIZE, _SIZE, _SIZE, st.sampled_from(sharding.MESH_AXES))
def test_one_mesh_size_is_whatever_is_left(
  first: int, second: int, rest: int, free: str
) -> None:
  names = [name for name in sharding.MESH_AXES if name != free]
  sizes = dict(zip(names, (first, second, 1), strict=True))
  config = sharding.MeshConfig(**sizes, **{free: -1})
  shape = config.sizes(first * second * rest)
  assert shape[sharding.MESH_AXES.index(free)] == rest
  assert math.prod(shape) == first * second * rest


@hypothesis.given(_SIZE, _SIZE, st.integers(1, 200))
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(
  data: int, tensor: int, num_devices: int
) -> None:
  hypothesis.assume(num_devices % (data * tensor))
  for fsdp in (-1, 1):
    config = sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    with pytest.raises(ValueError, match=f'must multiply to {num_devices=};'):
      config.sizes(num_devices)


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'data': -1}, r'^At most one mesh axis may be -1, got .*; set one\.$'),
    ({'tensor': 0}, r'^mesh\.tensor=0 must be a positive number or -1'),
    ({'island': -2}, r'^mesh\.island=-2 must be a positive number or -1'),
  ],
)
def test_an_illegal_mesh_size_is_refused(
  sizes: dict[str, int], message: str
) -> None:
  with pytest.raises(ValueError, match=message):
    sharding.MeshConfig(**sizes).validate()


def test_a_mesh_has_every_axis_in_order() -> None:
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
  assert mesh.axis_names == sharding.MESH_AXES
  assert mesh.size == 1


_AXES = {
  'layers': {'up': {'kernel': LogicalAxes(('embed',), ('mlp',), ('layers',))}}
}


@hypothesis.given(st.integers(1, 500), st.integers(2, 16))
def test_a_size_that_cannot_be_shared_is_named_with_the_next_legal_one(
  mlp: int, tensor: int
) -> None:
  def shardings(mlp: int) -> Any:
    leaf = jax.ShapeDtypeStruct((3, 8, mlp), float)
    shapes = {'layers': {'up': {'kernel': leaf}}}
    return sharding.param_shardings(_mesh(fsdp=4, tensor=tensor), _AXES, shapes)

  legal = next(n for n in range(mlp, mlp + tensor) if n % tensor == 0)
  kernel = shardings(legal)['layers']['up']['kernel']
  assert kernel.spec == PartitionSpec(None, 'fsdp', 'tensor')
  if legal == mlp:
    return
  with pytest.raises(ValueError) as caught:
    shardings(mlp)
  assert str(caught.value) == (
    f'layers/up/kernel: axis mlp={mlp} must be divisible by mesh axis '
    f'tensor={tensor}; the next legal size is {legal}.'
  )


@pytest.mark.parametrize('name', architectures.ARCHITECTURES)
def test_every_architecture_can_be_shared(name: str) -> None:
  config = architectures.ARCHITECTURES[name]
  shardings = sharding.param_shardings(
    _mesh(fsdp=4),
    transformer.logical_axes(config),
    transformer.abstract_params(config),
  )
  assert shardings['embedding']['tokens'].spec == PartitionSpec(
    'tensor', 'fsdp'
  )


@hypothesis.given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 9))
def test_a_batch_that_cannot_be_shared_is_refused_with_the_next_size(
  batch_size: int, data: int, fsdp: int
) -> None:
  mesh = _mesh(data=data, fsdp=fsdp, tensor=2)
  parts = data * fsdp
  if batch_size % parts == 0:
    sharding.check_batch_size(mesh, batch_size)
    return
  legal = next(n for n in range(batch_size, 900) if n % parts == 0)
  with pytest.raises(ValueError) as caught:
    sharding.check_batch_size(mesh, batch_size)
  message = str(caught.value)
  assert message.startswith(
    f'data.{batch_size=} must be divisible by the {parts} '
  )
  assert message.endswith(f'set data.batch_size={legal}.')


def test_what_cannot_be_shared_stays_whole() -> None:
  mesh = _mesh(data=2, fsdp=4, tensor=2)
  names = ('batch', None, 'heads')
  assert sharding.divisible_spec((8, 3, 4), names, mesh) == PartitionSpec(
    ('data', 'fsdp'), None, 'tensor'
  )
  assert sharding.divisible_spec((3, 3, 4), names, mesh) == PartitionSpec(
    None, None, 'tensor'
  )


def test_constraints_do_nothing_outside_a_mesh() -> None:
  x = jax.numpy.ones((3, 5))
  assert sharding.constrain(x, ('batch', 'mlp')) is x


@pytest.fixture(scope='module')
def eight() -> dict[str, Any]:
  """What `tests/eight_devices.py` found."""
  return simulated_devices.run('tests.eight_devices')


MESHES = pytest.mark.parametrize('mesh', ['fsdp4_tensor2', 'data2_fsdp4'])


@MESHES
def test_a_sharded_forward_pass_equals_that_of_one_device(
  eight: dict[str, Any], mesh: str
) -> None:
  assert eight['num_devices'] == 8
  # Float32 rounding, as partial products are added in another order.
  assert eight['size_of_logits'] > 1
  assert eight[mesh]['logits'] < 2e-5


@MESHES
def test_rows_that_the_mesh_cannot_share_give_the_same_logits(
  eight: dict[str, Any], mesh: str
) -> None:
  assert eight[mesh]['odd_logits'] < 2e-5


@MESHES
def test_sharded_train_steps_equal_those_of_one_device(
  eight: dict[str, Any], mesh: str
) -> None:
  # Rounding of gradients, over the epsilon of 0.1.
  assert eight[mesh]['params'] < 1e-4
  assert eight[mesh]['loss'] < 1e-4
  assert eight[mesh]['grad_norm'] < 1e-4


@pytest.mark.parametrize(
  ('mesh', 'parts', 'batch_parts'),
  [('fsdp4_tensor2', 8, 4), ('data2_fsdp4', 4, 8)],
)
def test_parameters_moments_and_rows_are_really_shared(
  eight: dict[str, Any], mesh: str, parts: int, batch_parts: int
) -> None:
  # Two kernels of one shape have two moments each.
  assert eight[mesh]['parts'] == [parts] * 5
  assert eight[mesh]['batch_parts'] == batch_parts


def test_splash_attention_works_on_a_part_of_rows_and_heads(
  eight: dict[str, Any],
) -> None:
  assert eight['splash'] < 2e-5
