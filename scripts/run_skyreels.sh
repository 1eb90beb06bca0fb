#!/usr/bin/env bash
# Generate a video with SkyReels-V2 and MotionCache; makes .venv on first use. Options: --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/scripts/setup_venv.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -m skyreels_v2_motioncache "$@"
