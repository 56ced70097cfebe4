"""Bytes that a compiled program reads from and writes to main memory."""

from efficient_llm.training import hlo

# They move nothing, or what they move is counted where it happens.
_FREE = (
  'add-dependency',
  'after-all',
  'async-start',
  'bitcast',
  'call',
  'conditional',
  'constant',
  'domain',
  'get-tuple-element',
  'infeed',
  'opt-barrier',
  'outfeed',
  'parameter',
  'partition-id',
  'recv',
  'replica-id',
  'send',
  'tuple',
  'while',
)


def count(program: hlo.Program) -> int:
  """Sums operands and results of all kernels, each as often as it runs.

  A slice counts as what is cut out, an update in place as what is put in, and
  what stays on the chip (a TPU's vector memory) not at all. Kernels that read
  an operand twice, and caches, are not seen: a model, not a measurement.
  """
  return sum(
    times * _instruction_bytes(program, computation, instruction)
    for computation, instruction, times in program.executed()
  )


def _instruction_bytes(
  program: hlo.Program,
  computation: hlo.Computation,
  instruction: hlo.Instruction,
) -> int:
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(('-done', '-update')):
    return 0
  written = _main(instruction.shape)
  if opcode.endswith('-start') and opcode != 'all-reduce-start':
    return written  # Its shape holds the operands too.
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * written
  if opcode == 'dynamic-update-slice':
    return 2 * _main(_shape(computation, instruction.operands[1]))
  if opcode != 'fusion':
    operands = dict.fromkeys(instruction.operands)
    return written + sum(_main(_shape(computation, o)) for o in operands)
  callee = program.called(instruction)
  if callee is None:
    return written
  read = 0
  for index, operand in enumerate(instruction.operands):
    full = _main(_shape(computation, operand))
    if full:
      read += min(full, _read_inside(program, callee, index, full))
  return read + _written_inside(program, callee, instruction.shape)


def _main(shape: str) -> int:
  return hlo.num_bytes(shape, main_memory_only=True)


def _shape(computation: hlo.Computation, name: str) -> str:
  found = computation.instructions.get(name)
  return found.shape if found else ''


def _read_inside(
  program: hlo.Program, computation: hlo.Computation, index: int, full: int
) -> int:
  """Bytes that a fusion reads of one of its parameters."""
  parameter = computation.parameters.get(index)
  if parameter is None:
    return 0
  read, names = 0, [parameter.name]
  while names and read < full:
    name = names.pop()
    for user in computation.users.get(name, ()):
      is_first = user.operands[0] == name
      if user.opcode == 'bitcast':
        names.append(user.name)
      elif user.opcode in ('dynamic-slice', 'slice', 'gather') and is_first:
        read += hlo.num_bytes(user.shape)
      elif user.opcode == 'dynamic-update-slice' and is_first:
        continue
      elif user.opcode == 'fusion' and (callee := program.called(user)):
        read += sum(
          _read_inside(program, callee, position, full)
          for position, operand in enumerate(user.operands)
          if operand == name
        )
      elif user.opcode != 'tuple':
        return full
  return read


def _written_inside(
  program: hlo.Program, computation: hlo.Computation, shape: str
) -> int:
  """Bytes that a fusion writes to results of this shape."""
  root, parts = computation.root, hlo.elements(shape)
  names = root.operands if root.opcode == 'tuple' else (root.name,)
  if len(names) != len(parts):
    return _main(shape)
  total = 0
  for name, part in zip(names, parts, strict=True):
    full = _main(part)
    total += min(full, _update_bytes(program, computation, name, full))
  return total


def _update_bytes(
  program: hlo.Program, computation: hlo.Computation, name: str, full: int
) -> int:
  """Size of the slice that is put in place, or the full size."""
  found = computation.instructions.get(name)
  while found and found.opcode == 'bitcast':
    found = computation.instructions.get(found.operands[0])
  if found and found.opcode == 'dynamic-update-slice':
    return hlo.num_bytes(_shape(computation, found.operands[1]))
  callee = program.called(found) if found and found.opcode == 'fusion' else None
  if callee is not None and callee.root.opcode != 'tuple':
    return _update_bytes(program, callee, callee.root.name, full)
  return full
