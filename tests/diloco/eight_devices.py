"""Islands on eight devices against one; prints the differences as JSON.

A program of its own, as the number of simulated devices is fixed before jax
starts. For each compiled program it also says which collectives cross islands.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from efficient_llm import sharding
from efficient_llm.diloco import compression, fragments, mesh
from efficient_llm.diloco.schedule import Event
from efficient_llm.training import collectives, hlo
from tests import tiny
from tests.diloco import islands

_ISLANDS = 4
_EVERYONE = (True,) * _ISLANDS


def _config(format: compression.Format) -> Any:
  model = dataclasses.replace(tiny.MODEL, num_layers=2, vocab_size=320)
  return islands.config(
    pathlib.Path('none.txt'),
    model=model,
    islands=_ISLANDS,
    fragments=fragments.FragmentConfig(2),
    compression=compression.CompressionConfig(format),
  )


def _batch() -> dict[str, np.ndarray]:
  rows = tiny.batch(batch_size=8 * _ISLANDS, num_tokens=32)
  return {
    name: x.reshape(_ISLANDS, 8, *x.shape[1:]) for name, x in rows.items()
  }


def _run(config: Any, layout: sharding.MeshConfig, count: int) -> Any:
  """State after two rounds, and the text of programs on several devices."""
  devices = sharding.make_mesh(layout, devices=jax.devices()[:count])
  program = mesh.build(config, devices)
  batch = sharding.to_global(_batch(), program.batch_sharding)
  texts = {}
  with jax.set_mesh(devices):
    state = program.init_state()
    if count > 1:
      arguments = (state.step, state.islands, state.tokens_PM, batch)
      lowered = program.inner_step.lower(*arguments)
      texts['inner'] = lowered.compile().as_text()
      send = program.outer_step.program('send', 0)
      reached = np.array(_EVERYONE)
      texts['send'] = send.lower(state, reached).compile().as_text()
    for fragment in (0, 1):
      number, own, tokens_PM, _ = program.inner_step(
        state.step, state.islands, state.tokens_PM, batch
      )
      state = state.replace(step=number, islands=own, tokens_PM=tokens_PM)
      for kind in ('send', 'apply'):
        event = Event(kind, fragment, _EVERYONE)
        state, _ = program.outer_step(state, event)
  return jax.device_get(state), texts, devices


def _difference(one: Any, other: Any) -> float:
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return max(float(np.abs(x - y).max()) for x, y in pairs)


def _crossing(text: str, devices: Any) -> list[list[Any]]:
  """Kind and bytes of what leaves an island."""
  layout = collectives.Layout(dict(devices.shape), [0] * devices.size)
  return [
    [found.kind, found.bytes_per_device_per_step]
    for found in collectives.collect(hlo.parse(text), layout)
    if {'island', 'unknown'} & set(found.mesh_axes)
  ]


def main() -> None:
  """Prints one JSON object."""
  report: dict[str, Any] = {'num_devices': jax.device_count()}
  one = sharding.MeshConfig(island=1, fsdp=1)
  many = sharding.MeshConfig(island=4, fsdp=2)
  for name in ('float32', 'int4'):
    config = _config(name)
    alone, _, _ = _run(config, one, 1)
    apart, texts, devices = _run(config, many, 8)
    program = mesh.build(config, devices)
    report[name] = {
      'params': _difference(alone.params, apart.params),
      'islands': _difference(alone.islands.params, apart.islands.params),
      'moved': _difference(
        alone.params, jax.tree.map(lambda x: x[0] * 0, alone.islands.params)
      ),
      'same_on_islands': _difference(
        apart.islands.params,
        jax.tree.map(lambda x: x[None], apart.params),
      ),
      'sent_bytes': program.sent_bytes[0],
      'crossing': {
        name: _crossing(text, devices) for name, text in texts.items()
      },
    }
  print(json.dumps(report))


if __name__ == '__main__':
  main()
