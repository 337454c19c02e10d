# Sourced by the scripts beside it: `install core` or `install test` makes .venv
# and puts `mor` in it with the pins of constraints.txt, once.
# shellcheck shell=bash

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python >= 3.11 among: ${candidates[*]}; install one, or name it:" \
    "PYTHON=/path/to/python $0" >&2
  return 1
}

make_venv() {
  local python
  if .venv/bin/python -m pip --version >/dev/null 2>&1; then return; fi
  python=$(find_python)
  echo "Making .venv with $("$python" --version)" >&2
  if ! "$python" -m venv --clear .venv; then
    echo "$python cannot make a virtual environment; on Debian or Ubuntu install" \
      "python3-venv" >&2
    return 1
  fi
}

install() {
  local target stamp stamped
  case $1 in
    core) target=. ;;
    *) target=".[$1]" ;;
  esac
  make_venv
  stamp=$(.venv/bin/python -c 'import hashlib, pathlib, sys
files = b"".join(pathlib.Path(f).read_bytes() for f in ("setup.py", "constraints.txt"))
print(hashlib.sha256(files + sys.version.encode()).hexdigest())')
  stamped=.venv/installed-$1
  if [[ -f $stamped && $(<"$stamped") == "$stamp" ]]; then return; fi
  echo "Installing $target into .venv (about a minute)" >&2
  .venv/bin/python -m pip install -qq --disable-pip-version-check \
    --use-pep517 --constraint constraints.txt --editable "$target"
  echo "$stamp" >"$stamped"
}

keep_compiled_programs() {
  local cache=${XDG_CACHE_HOME:-$HOME/.cache}
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache/mor/jax}
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
  export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
}
