"""Times, counts and sizes as people write them."""


def format_duration(secs: float) -> str:
  """Writes a time span in at most two units, such as '1m20s' or '0.35s'."""
  if not 0 <= secs < float('inf'):
    raise ValueError(f'{secs=} must be finite and not negative; check it.')
  if secs < 9.95:
    return f'{1e3 * secs:.2g}ms' if 0 < secs < 0.001 else f'{secs:.2g}s'
  whole = round(secs)
  minutes, seconds = divmod(whole, 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days}d{hours:02}h'
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'


def format_count(count: float, *, num_digits: int = 3) -> str:
  """Writes a count in few digits, such as '1.2M', '12.3k' or '950'."""
  return _scaled(count, 1000, ('', 'k', 'M', 'B', 'T'), num_digits)


def format_bytes(num_bytes: float) -> str:
  """Writes a size with a binary unit, such as '1.5 GiB'."""
  units = (' B', ' KiB', ' MiB', ' GiB', ' TiB', ' PiB', ' EiB')
  return _scaled(num_bytes, 1024, units, 3)


def _scaled(
  value: float, base: int, units: tuple[str, ...], num_digits: int
) -> str:
  scaled, index = float(value), 0
  # 999.5 would print as 1000, so it already belongs to the next unit.
  while abs(scaled) >= base - 0.5 and index < len(units) - 1:
    scaled, index = scaled / base, index + 1
  # Whole numbers of four digits, such as 1010 KiB, never as 1.01e+03.
  style = f'.{num_digits}g' if abs(scaled) < 999.5 else '.0f'
  return f'{scaled:{style}}{units[index]}'
