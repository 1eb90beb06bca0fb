#!/usr/bin/env bash
# The papers' main table, made again: both models, all methods; makes .venv on first use. Options: --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'TEXT'
usage: bash scripts/reproduce_table1.sh [options]

Makes the videos of both models with every method, scores them against exact execution, and writes one table as
Markdown, CSV and JSON. What is finished is not made again: the same command goes on where an earlier one ended.

  --tiny           the small checkpoints of this repository, on the CPU: under 30 minutes on two cores
                   (without it: SkyReels-V2 1.3B 540P and MAGI-1 4.5B distilled on VBench's prompts, on all GPUs,
                   scored with VBench too, which gets an environment of its own)
  --prompts N      only the first N prompts of each model (default: 4 with --tiny, else all)
  --processes N    side by side (default: as many as there are cores with --tiny, else GPUs)
  --output DIR     samples and tables (default: outputs/table1-tiny, outputs/table1)
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 2
}

tiny='' prompts='' processes='' output=''
while (($#)); do
    case $1 in
    --tiny) tiny=-tiny ;;
    --prompts | --processes)
        [[ ${2-} =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a whole number of at least 1, not '${2-}'"
        declare "${1#--}=$2"
        shift
        ;;
    --output)
        [[ -n ${2-} ]] || fail "--output needs a folder"
        output=$2
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "unknown option '$1'; see bash scripts/reproduce_table1.sh --help" ;;
    esac
    shift
done

bash "$root/scripts/setup_venv.sh"
python=$root/.venv/bin/python
[[ -z $output || $output == /* ]] || output=$PWD/$output
cd "$root"
output=${output:-outputs/table1$tiny}

if [[ -n $tiny ]]; then
    experiments=(table1_skyreels_v2_tiny table1_magi1_tiny)
    prompts=${prompts:-4}
    processes=${processes:-$(getconf _NPROCESSORS_ONLN)}
    launch=("$python" -m benchmarks.sample)
    parallel=(--processes "$processes")
else
    experiments=(table1_skyreels_v2_1.3b_540p table1_magi1_4.5b_distill)
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    ((gpus)) || fail "no CUDA GPU found, and the published models need one; give --tiny for the small checkpoints"
    processes=${processes:-$gpus}
    ((processes <= gpus)) || fail "--processes $processes is more than the $gpus GPUs of this machine"
    launch=("$python" -m accelerate.commands.launch --num_machines 1 --num_processes "$processes" --mixed_precision no
        --dynamo_backend no)
    ((processes > 1)) && launch+=(--multi_gpu)
    launch+=(-m benchmarks.sample)
    parallel=(--processes 1) # of each that is launched
    bash scripts/score_vbench.sh --install # its list of prompts is in it
fi

folders=()
for experiment in "${experiments[@]}"; do
    folder=$output/${experiment#table1_}
    "${launch[@]}" "configs/experiments/$experiment.yaml" --output "$folder" ${prompts:+--prompts "$prompts"} \
        "${parallel[@]}"
    "$python" -m benchmarks.score "$folder" --processes "$processes"
    [[ -n $tiny ]] || bash scripts/score_vbench.sh "$folder" --gpus "$processes"
    folders+=("$folder")
done
"$python" -m benchmarks.table "${folders[@]}" --output "$output/table1$tiny.json"
echo "The table is in $output/table1$tiny.md, .csv and .json"
