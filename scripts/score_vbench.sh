#!/usr/bin/env bash
# Score sampled videos with VBench; makes .venv-vbench on first use. Options: --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DETECTRON2='git+https://github.com/facebookresearch/detectron2.git'

usage() {
    cat <<'TEXT'
usage: bash scripts/score_vbench.sh OUT [options]
       bash scripts/score_vbench.sh --install [options]

Scores the folder OUT, which 'python -m benchmarks.sample EXPERIMENT --output OUT' filled from VBench's prompts, and
writes OUT/vbench.json. Needs an NVIDIA GPU, wget and unzip: VBench fetches its models on first use.
What is scored already is not scored again.

  --install          only make the environment; VBench's list of prompts is in it
  --no-detectron2    do without detectron2, which is compiled: object_class, multiple_objects, color and
                     spatial_relationship cannot be scored then, and so there is no total
  --python NAME      Python 3.10 or 3.11 for the environment (default: the first that is found)

Other options are those of 'python -m benchmarks.vbench': --dimensions NAME ..., --gpus N, --source FILE
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 2
}

install='' detectron2=1 python='' rest=()
while (($#)); do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --install) install=1 ;;
    --no-detectron2) detectron2='' ;;
    --python)
        [[ -n ${2-} ]] || fail "--python needs a name, such as python3.11"
        python=$2
        shift
        ;;
    *) rest+=("$1") ;;
    esac
    shift
done
[[ -n $install || ${#rest[@]} -gt 0 ]] || fail "name the folder with the samples; see bash scripts/score_vbench.sh --help"

venv=$root/.venv-vbench
wanted=$(cksum <"$root/requirements-vbench.txt" | tr -d ' ')${detectron2:+-detectron2}
stamp=$venv/.installed
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    for name in ${python:-python3.11 python3.10 python3}; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in {(3, 10), (3, 11)})' 2>/dev/null; then
            found=$name
            break
        fi
    done
    [[ -n ${found-} ]] || fail "VBench needs Python 3.10 or 3.11 with its venv module; install one, or name it with --python"
    for tool in wget unzip; do
        command -v $tool >/dev/null || fail "VBench fetches its models with $tool; install it"
    done
    echo "Making .venv-vbench ($("$found" --version)): once, several GB ..." >&2
    "$found" -m venv "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check -q)
    "${pip[@]}" install --requirement "$root/requirements-vbench.txt"
    if [[ -n $detectron2 ]]; then
        "${pip[@]}" install --no-build-isolation "$DETECTRON2" ||
            fail "detectron2 cannot be built (it needs git, a C++ compiler and CUDA 12.1); mend that, or use --no-detectron2"
    fi
    echo "$wanted" >"$stamp"
fi
[[ -z $install ]] || exit 0

bash "$root/scripts/setup_venv.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -m benchmarks.vbench \
    --scorer "$venv/bin/vbench" "${rest[@]}"
