"""Builds, and tests some of it, with a real Bazel where one is installed.

What BUILD names from outside, rules_python and packages, is stood in for by
Bazel's own rules and by the environment that runs this, so nothing is fetched.
Those rules left Bazel with version 8.
"""

import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_TESTS = (
  'tests/build_test',
  'tests/typing_test',
  'tests/optimizer_test',
  'tests/diloco/wan/rounds_test',
)
# Repositories, the folder in each, and its rules. Bazel's own tools load two.
_STAND_INS = {
  'rules_python': ('python', 'py_binary py_library py_test'),
  'rules_cc': (
    'cc',
    'cc_binary cc_import cc_library cc_proto_library cc_test cc_toolchain '
    'cc_toolchain_suite fdo_prefetch_hints fdo_profile objc_import '
    'objc_library',
  ),
  'rules_java': (
    'java',
    'java_binary java_import java_library java_lite_proto_library '
    'java_package_configuration java_plugin java_proto_library java_runtime '
    'java_test java_toolchain',
  ),
}
_COVERAGE = 'remote_coverage_tools'
_PATIENCE_SECS = 900


def _version() -> int | None:
  """Of the Bazel that is installed; None without one that will do."""
  if shutil.which('bazel') is None:
    return None
  found = subprocess.run(
    ['bazel', '--version'], capture_output=True, text=True, check=False
  )
  match = re.search(r'bazel (\d+)', found.stdout)
  return int(match[1]) if match and int(match[1]) < 8 else None


def _write(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


@pytest.fixture
def workspace(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
  """The checkout, with what stands in for the outside."""
  outside = tmp_path / 'outside'
  names = re.findall(r'"@pypi//(\w+)"', (_ROOT / 'BUILD').read_text())
  for name in set(names):
    _write(
      outside / 'pypi' / name / 'BUILD',
      'package(default_visibility = ["//visibility:public"])\n'
      f'py_library(name = "{name}")\n',
    )
  for name in ('pypi', _COVERAGE):
    _write(outside / name / 'WORKSPACE', '')
  _write(
    outside / _COVERAGE / 'BUILD',
    'package(default_visibility = ["//visibility:public"])\n'
    'filegroup(name = "coverage_report_generator")\n'
    'filegroup(name = "lcov_merger")\n',
  )
  for name, (folder, rules) in _STAND_INS.items():
    _write(outside / name / 'WORKSPACE', '')
    _write(outside / name / folder / 'BUILD', '')
    _write(
      outside / name / folder / 'defs.bzl',
      ''.join(f'{rule} = native.{rule}\n' for rule in rules.split()),
    )
  checkout = tmp_path / 'checkout'
  files = subprocess.run(
    ['git', 'ls-files'], cwd=_ROOT, capture_output=True, text=True, check=True
  )
  for name in files.stdout.splitlines():
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_ROOT / name, checkout / name)
  _write(
    checkout / 'WORKSPACE',
    'workspace(name = "efficient_llm")\n'
    + ''.join(
      f'local_repository(name = "{name}", path = "{outside / name}")\n'
      for name in ('pypi', _COVERAGE, *_STAND_INS)
    ),
  )
  yield checkout
  _bazel(checkout, 'shutdown')


def _bazel(workspace: pathlib.Path, *arguments: str) -> None:
  found = subprocess.run(
    [
      'bazel',
      f'--output_user_root={workspace.parent / "bazel"}',
      '--nohome_rc',
      '--nosystem_rc',
      *arguments,
    ],
    cwd=workspace,
    capture_output=True,
    text=True,
    timeout=_PATIENCE_SECS,
    check=False,
  )
  assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.skipif(_version() is None, reason='needs Bazel, before 8')
def test_every_target_builds_and_tests_pass(workspace: pathlib.Path) -> None:
  python = [
    f'--python_path={sys.executable}',
    '--incompatible_use_python_toolchains=false',
  ]
  _bazel(workspace, 'build', '--nobuild_runfile_links', *python, '//:all')
  _bazel(
    workspace,
    'test',
    '--test_output=errors',
    *python,
    *(f'//:{name}' for name in _TESTS),
  )
