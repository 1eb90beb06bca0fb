#!/usr/bin/env bash
# Makes .venv with everything in requirements.txt, once: later calls return at once until the requirements change.
#
#   bash scripts/setup_venv.sh          to run
#   bash scripts/setup_venv.sh --dev    to test as well (requirements-dev.txt)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

files=(requirements.txt)
[[ "${1:-}" == --dev ]] && files+=(requirements-dev.txt)
TORCH=torch==2.13.0 # what a fresh .venv gets; any version that requirements.txt allows is kept

wanted=$(cat "${files[@]}" | cksum | tr -d ' ')
stamp=.venv/.installed-${files[-1]}
if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

if [[ ! -x .venv/bin/python ]]; then
    if ! command -v python3 >/dev/null; then
        echo "error: no python3 found; install Python 3.10 or newer" >&2
        exit 2
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $(python3 --version) is too old; install Python 3.10 or newer" >&2
        exit 2
    fi
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        echo "error: python3 cannot make virtual environments; install its venv module (Debian, Ubuntu: python3-venv)" >&2
        exit 2
    fi
    echo "Making .venv ($(python3 --version)) ..." >&2
    python3 -m venv .venv
fi
# An interrupted first run leaves a .venv without pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null

pip=(.venv/bin/python -m pip --disable-pip-version-check -qq)
echo "Installing ${files[*]} into .venv: once, a few minutes ..." >&2
if ! .venv/bin/python - <<'PY'; then
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    major, minor = (int(part) for part in version("torch").split(".")[:2])
except PackageNotFoundError:
    sys.exit(1)
sys.exit(not (2, 10) <= (major, minor) < (2, 14))
PY
    "${pip[@]}" install "$TORCH"
fi
"${pip[@]}" install "${files[@]/#/--requirement=}"
echo "$wanted" >"$stamp"
