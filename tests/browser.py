"""Looks at pages in a real browser without a window."""

import pathlib
import re
import shutil
import subprocess

import pytest

_FRAME = """<iframe id="page" src="{page}" style="width:{width}px"></iframe>
<p id="widths"></p>
<script>
const page = document.getElementById('page');
page.onload = () => {{
  const root = page.contentDocument.documentElement;
  document.getElementById('widths').textContent =
    `widths ${{root.scrollWidth}} ${{root.clientWidth}}`;
}};
</script>"""


def show(address: str, *flags: str) -> str:
  """What a browser makes of a page, without a message on its console.

  A test is skipped where there is no browser.

  Args:
    address: Of the page.
    flags: Further ones of the browser.
  """
  chromium = shutil.which('chromium') or shutil.which('google-chrome')
  if chromium is None:
    pytest.skip('The page was not looked at: there is no chromium.')
  command = [
    chromium,
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--enable-logging=stderr',
    '--virtual-time-budget=5000',
    '--dump-dom',
    *flags,
    address,
  ]
  # Its time is not ours: now and then it is over before the page has come.
  for _ in range(5):
    run = subprocess.run(
      command, capture_output=True, text=True, timeout=120, check=True
    )
    assert 'CONSOLE' not in run.stderr
    if run.stdout.strip():
      return run.stdout
  raise AssertionError(f'{address} stays empty')


def check_page(page: pathlib.Path, *, width: int) -> None:
  """No message on the console, and nothing wider than the window."""
  frame = page.with_name(f'frame_{width}.html')
  frame.write_text(_FRAME.format(page=page.name, width=width))
  shown = show(frame.as_uri(), '--allow-file-access-from-files')
  found = re.search(r'widths (\d+) (\d+)<', shown)
  assert found is not None
  assert int(found[1]) <= int(found[2])
