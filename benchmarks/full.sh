#!/usr/bin/env bash
# Every measurement that the documentation quotes. Results go to benchmarks/results, checkpoints to
# $MERGE_ENGINE_BENCH_DIR (a folder on the disk to be measured; 70 GB with the outputs).
#
#     bash benchmarks/full.sh PATH/mergekit-yaml [PART ...]
#
# A part can be measured alone: headline, methods, cycles, ledger, tensors, slow, files, models, sizes, primitives.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mergekit=$1
shift
parts=${*:-headline methods cycles ledger tensors slow files models sizes primitives}
results=benchmarks/results/$(date +%F)
mkdir -p "$results"

bench() { # part, options: merge-engine bench, with a log of its tables beside the numbers
    local part=$1
    shift
    merge-engine bench --mergekit "$mergekit" --save "$results/$part.json" "$@" 2>&1 | tee "$results/$part.txt"
}

for part in $parts; do
    case $part in
        headline) bench headline --sizes 1.1b --methods ties,linear --rounds 5 ;;
        methods) # on a RAM disk, so that the arithmetic is seen
            bench methods --sizes 1.1b --methods all --rounds 3 --output /dev/shm \
                --mergekit-rounds 0 --torch-rounds 0
            ;;
        models) # here and below without mergekit and torch, which would take hours
            bench models --sizes 0.5b --models 2,5,10,20 --distinct 4 --methods ties --rounds 3 \
                --mergekit-rounds 0 --torch-rounds 0 --plot "$results/models.png"
            ;;
        sizes)
            bench sizes --sizes 0.5b,1.1b,3b,7b --distinct 1 --methods ties --cache cold --rounds 3 \
                --mergekit-rounds 0 --torch-rounds 0 --plot "$results/sizes.png"
            ;;
        files)
            bench files --sizes 1.1b --methods ties,linear --cache both --shard-sizes 5GB,50MB --rounds 3 \
                --mergekit-rounds 0 --torch-rounds 0
            ;;
        slow) bench slow --sizes 0.5b --methods ties,linear --slow-disk 200MB --rounds 3 ;;
        cycles)
            for method in ties linear della; do python -m benchmarks.cycles --method "$method"; done |
                tee "$results/cycles.txt"
            ;;
        ledger) python -m benchmarks.ledger | tee "$results/ledger.txt" ;;
        tensors) bench tensors --sizes moe --methods ties,linear --rounds 3 ;;
        primitives)
            python -m pytest benchmarks --benchmark-enable --benchmark-json "$results/primitives.json" \
                --benchmark-columns min,median,max,rounds
            ;;
        *) echo "there is no part $part" >&2 && exit 1 ;;
    esac
done
