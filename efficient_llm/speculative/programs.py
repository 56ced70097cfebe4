"""A pool of compiled programs that knows what compiling cost."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax


class Programs:
  """Compiles a function once per static arguments and shapes.

  Attributes:
    compile_secs: Spent compiling so far.
  """

  def __init__(self) -> None:
    self.compile_secs = 0.0
    self._compiled: dict[Any, jax.stages.Compiled] = {}

  def __len__(self) -> int:
    return len(self._compiled)

  def call(
    self,
    function: Callable[..., Any],
    static: tuple,
    *arguments: Any,
    donated: tuple[int, ...] = (),
  ) -> Any:
    """Runs `function(*static, *arguments)` on the device.

    Args:
      function: Pure, of arrays.
      static: First arguments, hashable.
      *arguments: Pytrees of arrays.
      donated: Those that are updated in place, by number; always the same for
        one function.
    """
    leaves, structure = jax.tree.flatten(arguments)
    name = (
      function,
      static,
      structure,
      tuple((x.shape, x.dtype) for x in leaves),
    )
    if name not in self._compiled:
      start = time.perf_counter()
      program = jax.jit(
        functools.partial(function, *static), donate_argnums=donated
      )
      self._compiled[name] = program.lower(*arguments).compile()
      self.compile_secs += time.perf_counter() - start
    return self._compiled[name](*arguments)
