#!/usr/bin/env bash
# A prior of toys from nothing: toys and things, the autoencoder of both, the prior of the toys. `sample/perceptual.pt`
# stays as it is: it measures.
#
#   sample/train.sh FOLDER [DIAL [SETTING ...]]      writes FOLDER/small.pt; keeps its log in FOLDER/train.log
#
# DIAL scales how many toys and steps there are. 1, the default, is meant for 25 minutes of one H200, by the rates of
# its parts. SETTINGs are numbers of the model, as in `train.py vae --set`. Stopped anywhere (Ctrl-C, SIGTERM), the same
# command resumes: finished stages are skipped, a training that was stopped goes on. Another dial needs another folder.
set -euo pipefail
folder=$(realpath -m "${1:?usage: sample/train.sh FOLDER [DIAL [SETTING ...]]}")
dial=${2:-1}
[[ $dial =~ ^[0-9]*\.?[0-9]+$ ]] || { echo "error: DIAL $dial: not a number above 0, such as 0.1" >&2; exit 2; }
preset=small  # the one place to name another
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
mkdir -p "$folder"
exec > >(tee -a "$folder/train.log") 2>&1

# What runs is stopped with this script, and saves.
trap 'for child in $(jobs -p); do kill $child || true; wait $child || true; done' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

scaled() {  # a number times the dial, between a least and a most one
    awk -v n="$1" -v least="$2" -v most="${3:-1e9}" -v dial="$dial" \
        'BEGIN { n = int(n * dial); if (n < least) n = least; if (n > most) n = most; print n }'
}
start() {  # a stage and its command, in the background; nothing if an earlier run came to its end
    local stage=$1
    shift
    [ -e "$folder/$stage.done" ] && set -- true
    echo "[$SECONDS s] $stage: $*"
    "$@" &
}
finish() {  # a stage and its process
    wait "$2"
    touch "$folder/$1.done"
}

# Most toys are drawn while the autoencoder is trained on the first ones, and on things, whose surfaces are as rich as
# photographed ones.
start things "$python" sample/things.py --root "$folder/things" --seed 1 --instances "$(scaled 1000 1)" --views 8
finish things $!
start toys1 "$python" sample/toys.py --root "$folder/toys/1" --seed 1 --instances "$(scaled 2000 1)"
finish toys1 $!
start toys2 "$python" sample/toys.py --root "$folder/toys/2" --seed 2 --instances "$(scaled 6000 1)"
rest=$!
start vae "$python" train.py vae --root "$folder"/{toys/1,things} --category toys things --preset "$preset" \
    --out "$folder/vae.pt" --steps "$(scaled 4000 2)" --set batch="$(scaled 64 2 64)" lr=1e-3 "${@:3}"
finish vae $!
finish toys2 $rest

start prior "$python" train.py prior --root "$folder"/toys/{1,2} --vae "$folder/vae.pt" --out "$folder/$preset.pt" \
    --steps "$(scaled 19000 2)" --set batch="$(scaled 16 2 16)" lr=8e-4
finish prior $!
echo "[$SECONDS s] $folder/$preset.pt"
