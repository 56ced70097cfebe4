#!/usr/bin/env bash
# Makes .venv once from requirements.lock, then runs what it is given:
#   ./run.sh [--quick]                  the main job: trains a model cheaper in
#                                       four ways and says what each saved
#   ./run.sh test [--slow] [ARGS...]    runs the tests (ARGS go to pytest)
#   ./run.sh CMD [ARGS...]              runs CMD in the environment
# PYTHON=/path/to/python3.12 ./run.sh   chooses the Python of the environment
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
venv=$root/.venv
stamp=$venv/complete
# Called from an active .venv, it must not be remade by its own Python.
PATH=${PATH//"$venv/bin:"/}

fail() {
  echo "run.sh: $1" >&2
  exit "$2"
}

# What the environment is made of: another lock, Python or place remakes it.
fingerprint=$("$python" - "$root" 2>/dev/null <<'EOF'
import hashlib, sys
lock = open(sys.argv[1] + '/requirements.lock', 'rb').read()
if sys.version_info < (3, 11):
  sys.exit(1)
print(hashlib.sha256(lock).hexdigest(), sys.version.split()[0], *sys.argv[1:])
EOF
) || fail "Python 3.11 or later is needed and '$python' is not one; \
install it or set PYTHON=/path/to/python3." 2

is_complete() {
  [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$fingerprint" ]]
}

make_environment() {
  # Another run.sh may have made it while this one waited for the lock.
  if is_complete; then return; fi
  echo "run.sh: making .venv (once, about two minutes)" >&2
  # The stamp goes first, so that a removal cut short is noticed too.
  rm -f "$stamp" && rm -rf "$venv" || fail "cannot remove $venv." 1
  "$python" -m venv "$venv" >/dev/null || fail "'$python -m venv' failed; \
install it (Debian, Ubuntu: apt install python3-venv)." 1
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --require-hashes --only-binary :all: -r "$root/requirements.lock" ||
    fail "installing requirements.lock failed; run again to retry." 1
  # Written last and by a rename: it is there only if all else is.
  echo "$fingerprint" >"$stamp.part" && mv "$stamp.part" "$stamp"
}

if ! is_complete; then
  mkdir -p "$root/.cache"
  (
    if command -v flock >/dev/null; then flock 9; fi
    make_environment
  ) 9>"$root/.cache/setup.lock"
fi

export PATH=$venv/bin:$PATH
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export VIRTUAL_ENV=$venv
# XLA on a CPU asks for its work space anew at every step: with huge pages that
# is 300 page faults instead of 49,000, and a fifth less processor time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
# numpy's matrices here are small: its further threads wait in a loop, which
# takes longer than the work where other processes want the cores.
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS-1}

main_job() {
  cd "$root"
  exec python -m experiments.end_to_end --cpu_workers=2 "$@"
}

case ${1-} in
  '') main_job --workdir=out/end_to_end ;;
  --quick)
    main_job --workdir=out/end_to_end_quick \
      --config=experiments/configs/end_to_end_cpu.py:quick
    ;;
  test)
    shift
    cd "$root"
    exec python -m pytest --numprocesses=2 --dist=loadfile \
      --no-loadscope-reorder "$@"
    ;;
  *) exec "$@" ;;
esac
