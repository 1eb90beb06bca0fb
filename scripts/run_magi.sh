#!/usr/bin/env bash
# Generate a video with MAGI-1 and MotionCache; makes .venv on first use. Options: --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/scripts/setup_venv.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -m magi1_motioncache "$@"
