#!/usr/bin/env bash
# Run the test suite, in as many processes as there are cores; makes .venv on first use. Arguments go to pytest:
#
#   bash scripts/test.sh -k metrics -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_venv.sh --dev
exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
