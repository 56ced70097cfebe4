"""Hands one test file to pytest, for build systems that run a script."""

import sys

import pytest

if __name__ == '__main__':
  sys.exit(pytest.main(sys.argv[1:]))
