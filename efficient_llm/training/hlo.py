"""Reads a compiled program's text: what runs, how often, what it moves.

A scanned layer stack is one loop body in the program, so everything counted
here is multiplied by the trip counts of the loops around it.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_NAME = re.compile(r'%([\w.-]+)')
_OPCODE = re.compile(r'([\w-]+)\(')
_CONSTANT = re.compile(r'constant\((-?\d+)\)')
# A tiled layout is a TPU's; there a space other than 0 is on the chip itself.
_ON_CHIP = re.compile(r'T\(.*S\([1-9]')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    shape: Type and layout as written; a tuple in parentheses.
    attributes: All text after the operands.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  attributes: str
  text: str

  def attribute(self, key: str) -> str | None:
    """The computation or number that stands behind `key=`."""
    found = re.search(rf'\b{key}=%?([\w.-]+)', self.attributes)
    return found and found[1]

  @functools.cached_property
  def constant(self) -> int | None:
    """The value of a whole-number constant."""
    found = _CONSTANT.search(self.text)
    return int(found[1]) if self.opcode == 'constant' and found else None


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in order, and which of them is the result."""

  name: str
  instructions: dict[str, Instruction]
  root: Instruction

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """The instructions that read each instruction."""
    users = collections.defaultdict(list)
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return users

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    return {
      int(instruction.text.partition('parameter(')[2].partition(')')[0]): (
        instruction
      )
      for instruction in self.instructions.values()
      if instruction.opcode == 'parameter'
    }

  def source(self, name: str) -> Instruction | None:
    """What an instruction is but for copies and other views."""
    found = self.instructions.get(name)
    while found and found.opcode in ('copy', 'bitcast', 'convert', 'reshape'):
      found = self.instructions.get(found.operands[0])
    return found


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    computations: By name.
    runs: How often each computation that is not part of a fusion runs.
    num_unknown_loops: Loops whose trip count is not in the text; their bodies
      count once.
  """

  computations: dict[str, Computation]
  runs: dict[str, int]
  num_unknown_loops: int

  def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction outside fusions and how often it runs."""
    for name, count in self.runs.items():
      computation = self.computations[name]
      for instruction in computation.instructions.values():
        yield computation, instruction, count

  def called(self, instruction: Instruction) -> Computation | None:
    """The computation that a fusion or an asynchronous start wraps."""
    return self.computations.get(instruction.attribute('calls') or '')


def parse(text: str) -> Program:
  """Reads what `jax.stages.Compiled.as_text()` returns.

  Raises:
    ValueError: If there is no entry computation in it.
  """
  computations, entry = _computations(text)
  if entry is None:
    raise ValueError(
      'The program text must hold an ENTRY computation and holds none; pass '
      'as_text() of a compiled program.'
    )
  runs: dict[str, int] = collections.defaultdict(int)
  unknown: set[str] = set()

  def visit(name: str, count: int) -> None:
    computation = computations.get(name)
    if computation is None:
      return
    runs[name] += count
    for instruction in computation.instructions.values():
      times = count
      if instruction.opcode == 'while':
        trips = _trip_count(computations, computation, instruction)
        if trips is None:
          unknown.add(f'{name} {instruction.name}')
        times *= 1 if trips is None else trips
      for callee in _control_callees(instruction):
        visit(callee, times)

  visit(entry, 1)
  return Program(computations, dict(runs), len(unknown))


def num_bytes(shape: str, *, main_memory_only: bool = False) -> int:
  """Bytes of all arrays in a shape, without padding."""
  return sum(
    _array_bytes(dtype, sizes)
    for dtype, sizes, layout in _ARRAY.findall(shape)
    if not (main_memory_only and _ON_CHIP.search(layout))
  )


def elements(shape: str) -> list[str]:
  """The parts of a tuple shape; a single array is its own part."""
  if not shape.startswith('('):
    return [shape]
  parts, start, depth = [], 1, 0
  for index, character in enumerate(shape):
    depth += (character in '([{') - (character in ')]}')
    if (character == ',' and depth == 1) or (character == ')' and depth == 0):
      parts.append(shape[start:index].strip())
      start = index + 1
  return [part for part in parts if part]


def _array_bytes(dtype: str, sizes: str) -> int:
  if dtype in ('token', 'opaque'):
    return 0
  digits = re.search(r'\d+', dtype)
  bits = 8 if dtype == 'pred' or digits is None else int(digits[0])
  count = math.prod(int(size) for size in sizes.split(',') if size)
  return -(-count * bits // 8)


def _computations(text: str) -> tuple[dict[str, Computation], str | None]:
  computations: dict[str, Computation] = {}
  entry, name, root = None, None, None
  instructions: dict[str, Instruction] = {}
  for line in text.splitlines():
    if name is None:
      if line.endswith('{') and not line.startswith((' ', 'HloModule')):
        words = line.split()
        is_entry = words[0] == 'ENTRY'
        name = words[is_entry].lstrip('%').partition('(')[0]
        entry = name if is_entry else entry
        instructions, root = {}, None
    elif line == '}':
      if root is not None:
        computations[name] = Computation(name, instructions, root)
      name = None
    else:
      instruction = _instruction(line)
      if instruction is not None:
        instructions[instruction.name] = instruction
        if line.lstrip().startswith('ROOT ') or root is None:
          root = instruction
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  left, equals, right = line.strip().partition(' = ')
  # A kernel's own description may stand on lines of its own.
  if not equals or not left.startswith(('%', 'ROOT %')):
    return None
  # A tuple's shape has spaces in it, an array's has none.
  end = _closing(right, 0) + 1 if right[0] == '(' else right.find(' ')
  shape, rest = right[:end], right[end:].lstrip()
  opcode = _OPCODE.match(rest)
  if opcode is None:
    return None
  close = _closing(rest, opcode.end() - 1)
  return Instruction(
    name=left.removeprefix('ROOT ').lstrip('%'),
    opcode=opcode[1],
    shape=shape,
    operands=tuple(_NAME.findall(rest[opcode.end() : close])),
    attributes=rest[close + 1 :],
    text=rest,
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == '(') - (text[index] == ')')
    if depth == 0:
      return index
  return len(text)


def _control_callees(instruction: Instruction) -> list[str]:
  """Computations that run as a sequence of their own, not inside one kernel."""
  keys = {
    'while': ('body', 'condition'),
    'call': ('to_apply',),
    'async-start': ('calls',),
    'conditional': ('true_computation', 'false_computation'),
  }.get(instruction.opcode, ())
  names = [instruction.attribute(key) for key in keys]
  branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.text)
  return [name for name in names if name] + (
    _NAME.findall(branches[1]) if branches else []
  )


def _trip_count(
  computations: dict[str, Computation],
  caller: Computation,
  loop: Instruction,
) -> int | None:
  """How often a loop's body runs; None where the text does not say."""
  known = re.search(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)', loop.text)
  if known:
    return int(known[1])
  condition = computations.get(loop.attribute('condition') or '')
  body = computations.get(loop.attribute('body') or '')
  if condition is None or body is None:
    return None
  compare = condition.root
  limit, index = None, None
  for operand in compare.operands:
    found = condition.source(operand)
    if found is None:
      continue
    limit = found.constant if found.constant is not None else limit
    index = found.attribute('index') or index
  # TPU programs have no field for it; jax.lax.scan counts up to a constant.
  if limit is None or index is None or 'direction=LT' not in compare.text:
    return None
  start = _tuple_element(caller, loop.operands[0], int(index))
  first = 0 if start is None or start.constant is None else start.constant
  return max(0, -(-(limit - first) // _increment(body, int(index))))


def _tuple_element(
  computation: Computation, name: str, index: int
) -> Instruction | None:
  found = computation.source(name)
  if found is None or found.opcode != 'tuple':
    return None
  return computation.source(found.operands[index])


def _increment(body: Computation, index: int) -> int:
  """By how much a loop's counter grows: 1 where the addition is not plain."""
  found = _tuple_element(body, body.root.name, index)
  if found is not None and found.opcode == 'add':
    for operand in found.operands:
      source = body.source(operand)
      if source is not None and source.constant:
        return source.constant
  return 1
