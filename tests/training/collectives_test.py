"""Tests of bytes between devices, on text and on compiled programs."""

import json
import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.training import collectives, hlo
from tests import simulated_devices

_LAYOUT = collectives.Layout({'data': 2, 'fsdp': 4}, granules=[0] * 8)
_TWO_SLICES = collectives.Layout(
  {'data': 2, 'fsdp': 4}, granules=[0] * 4 + [1] * 4
)
# One collective per axis of a 2 x 2 x 2 mesh, some of them in a loop of three.
_EIGHT_DEVICES = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from efficient_llm.training import collectives, hlo

names = ('data', 'fsdp', 'tensor')
mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)

def local(x):
  # A function after each, as the compiler merges what is linear.
  y = jnp.sin(jax.lax.psum(x, ('data', 'fsdp')))
  y += jnp.sin(jax.lax.all_gather(x, 'fsdp')).sum(0)
  y += jnp.sin(jax.lax.psum_scatter(x, 'tensor', tiled=True)).sum()
  y += jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)])
  def body(z, _):
    return jnp.sin(jax.lax.psum(z, 'tensor')), None
  return y + jax.lax.scan(body, x, length=3)[0]

spec = PartitionSpec(names)
function = jax.shard_map(
  local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
)
text = jax.jit(function).lower(jnp.ones((8 * 64, 4))).compile().as_text()
layout = collectives.Layout(dict(mesh.shape), [0] * 8)
print(json.dumps([
  [found.kind, found.mesh_axes, found.count, found.bytes_per_device_per_step]
  for found in collectives.collect(hlo.parse(text), layout)
]))
"""


def _collect(
  *lines: str, layout: collectives.Layout = _LAYOUT
) -> list[collectives.Collective]:
  text = '\n'.join(
    ['ENTRY %main (x: f32[8]) -> f32[8] {', *lines, '}', '', 'HloModule m']
  )
  return collectives.collect(hlo.parse(text), layout)


def _line(name: str, opcode: str, groups: str, more: str = '') -> str:
  return (
    f'  %{name} = f32[8]{{0}} {opcode}(%x), channel_id=1, {groups}, '
    f'use_global_device_ids=true{more}'
  )


_X = '  %x = f32[8]{0} parameter(0)'


def test_compiled_collectives_have_their_axes_counts_and_bytes() -> None:
  run = subprocess.run(
    [sys.executable, '-c', _EIGHT_DEVICES],
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': simulated_devices.flags(),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  found = {
    (kind, tuple(axes)): (count, num_bytes)
    for kind, axes, count, num_bytes in json.loads(run.stdout)
  }
  operand_bytes = 64 * 4 * 4
  assert found == {
    ('all-reduce', ('data', 'fsdp')): (1, operand_bytes * 2 * 3 // 4),
    ('all-gather', ('fsdp',)): (1, operand_bytes),
    ('reduce-scatter', ('tensor',)): (1, operand_bytes // 2),
    ('collective-permute', ('data',)): (1, operand_bytes),
    ('all-reduce', ('tensor',)): (3, 3 * operand_bytes),
  }


@hypothesis.given(st.data())
def test_a_partition_of_the_devices_is_the_same_however_it_is_written(
  data: st.DataObject,
) -> None:
  sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
  axes = list(range(len(sizes)))
  along = data.draw(
    st.lists(st.sampled_from(axes), unique=True, min_size=1).map(sorted)
  )
  others = [axis for axis in axes if axis not in along]
  count = int(np.prod(sizes))
  members = int(np.prod([sizes[axis] for axis in along]))
  ids = np.arange(count).reshape(sizes).transpose([*others, *along])
  expected = ids.reshape(-1, members)

  listed = ','.join(
    '{' + ','.join(map(str, group)) + '}' for group in expected.tolist()
  )
  shape, order = (
    ','.join(map(str, sizes)),
    ','.join(map(str, [*others, *along])),
  )
  mesh = ','.join(f"'a{axis}'={size}" for axis, size in enumerate(sizes))
  names = ','.join(f"'a{axis}'" for axis in along)
  for text in (
    f'replica_groups={{{listed}}}, dimensions={{0}}',
    f'replica_groups=[{count // members},{members}]<=[{shape}]T({order}), x=1',
    f'replica_groups=mesh[{mesh}] {{{names}}}, x={{1}}',
  ):
    found = collectives.device_groups(text, count)
    assert found is not None
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('replica_groups={}', [[0, 1, 2, 3]]),
    ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]]),
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}",
      [[0, 2], [1, 3]],
    ),
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}",
      [[3, 2], [1, 0]],
    ),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
  ],
)
def test_groups_are_read(text: str, expected: list[list[int]]) -> None:
  found = collectives.device_groups(text, 4)
  assert found is not None
  assert found.tolist() == expected


def test_a_start_and_its_end_count_once_and_overlap() -> None:
  (found,) = _collect(
    _X,
    '  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), channel_id=1, '
    'replica_groups=[2,4]<=[8], dimensions={0}',
    '  %d = f32[32]{0} all-gather-done(%s)',
  )
  assert found.overlapped
  assert (found.count, found.bytes_per_device_per_step) == (1, 3 * 32)


def test_a_start_that_waits_does_not_overlap() -> None:
  (found,) = _collect(
    _X,
    _line('s', 'all-reduce-start', 'replica_groups=[2,4]<=[8]')
    + ', backend_config={"collective_backend_config":{"is_sync":true}}',
  )
  assert not found.overlapped


def test_start_steps_and_end_in_kernels_of_a_tpu_count_once() -> None:
  kernel = '%{name} (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n'
  kernel += _line('g', 'all-gather', 'replica_groups=[2,4]<=[8]').replace(
    '%x', '%p'
  )
  kernel += '\n  ROOT %r = f32[8]{{0}} custom-call(%g){target}\n}}\n\n'
  start = ', custom_call_target="AsyncCollectiveStart"'
  end = ', custom_call_target="AsyncCollectiveDone"'
  kernels = (('start', start), ('async_collective_fusion.1', ''), ('end', end))
  text = ''.join(
    kernel.replace('{0} all', '{{0}} all').format(name=name, target=target)
    for name, target in kernels
  )
  calls = '\n'.join(
    f'  %{name} = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%{name}'
    for name, _ in kernels
  )
  text += f'ENTRY %main (x: f32[8]) -> f32[8] {{\n{_X}\n{calls}\n}}\n'
  (found,) = collectives.collect(hlo.parse(text), _LAYOUT)
  assert (found.kind, found.count) == ('all-gather', 1)
  assert found.overlapped


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter() -> None:
  (found,) = _collect(
    _X,
    _line('a', 'all-reduce', 'replica_groups=[2,4]<=[8]'),
    '  %z = s32[] constant(0)',
    '  ROOT %y = f32[2]{0} dynamic-slice(%a, %z), dynamic_slice_sizes={2}',
  )
  assert found.kind == 'reduce-scatter'
  assert found.bytes_per_device_per_step == 32 * 3 / 4


def test_a_group_of_one_moves_nothing() -> None:
  assert not _collect(_X, _line('a', 'all-reduce', 'replica_groups=[8,1]<=[8]'))


def test_a_permutation_that_keeps_its_place_moves_nothing() -> None:
  groups = 'source_target_pairs={{0,0},{1,1}}'
  assert not _collect(_X, _line('a', 'collective-permute', groups))


def test_a_transfer_between_slices_is_told_apart() -> None:
  inside, across = _collect(
    _X,
    _line('a', 'all-reduce', 'replica_groups=[2,4]<=[8]'),
    '  %s = (f32[4]{0:T(128)}, u32[], token[]) send(%x), channel_id=2, '
    'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
    layout=_TWO_SLICES,
  )
  assert (inside.mesh_axes, inside.crosses_network) == (('fsdp',), False)
  assert (across.mesh_axes, across.crosses_network) == (('data',), True)
  # All-reduce between two sends what it holds once.
  assert across.bytes_per_device_per_step == 16


def test_groups_that_span_hosts_cross_the_network() -> None:
  (found,) = _collect(
    _X,
    _line('a', 'all-reduce', 'replica_groups=[4,2]<=[2,4]T(1,0)'),
    layout=_TWO_SLICES,
  )
  assert (found.mesh_axes, found.crosses_network) == (('data',), True)


def test_devices_that_are_not_in_the_mesh_have_no_axes() -> None:
  (found,) = _collect(
    _X, _line('a', 'all-reduce', 'replica_groups={{0,1},{8,9}}')
  )
  assert found.mesh_axes == ('unknown',)
