#!/usr/bin/env bash
# A prior of toys or of things from nothing: their pictures, the autoencoder, the prior. `sample/perceptual.pt` stays as
# it is: it measures.
#
#   sample/train.sh toys FOLDER [DIAL [SETTING ...]]      writes FOLDER/nano.pt; keeps its log in FOLDER/train.log
#   sample/train.sh things FOLDER [DIAL [SETTING ...]]    writes FOLDER/things.pt
#
# DIAL scales how many pictures and steps there are. With 1, the default, toys take 24 minutes of one H200; things, four
# times as long, were trained in stages (docs/training.md). SETTINGs are numbers of the model, as in `train.py vae
# --set`. Stopped anywhere (Ctrl-C, SIGTERM), the same command resumes: finished stages are skipped, a training that was
# stopped goes on. Another dial needs another folder.
set -euo pipefail
usage="usage: sample/train.sh toys|things FOLDER [DIAL [SETTING ...]]"
what=${1:?$usage}
folder=$(realpath -m "${2:?$usage}")
dial=${3:-1}
[[ $dial =~ ^[0-9]*\.?[0-9]+$ ]] || { echo "error: DIAL $dial: not a number above 0, such as 0.1" >&2; exit 2; }
preset=nano  # the one place to name another
# The weights' name, what they are trained on, toys of seed 1, more (kind, seed, how many, views of each), how long, how
# rough inputs are.
case $what in
toys) name=$preset categories=(toys) toys=2000 more=(toys 2 6000 16) steps=22000 rough=0 ;;
things) name=things categories=(toys things) toys=10000 more=(things 2 29000 8) steps=92000 rough=1 ;;
*) echo "error: $what: not toys or things; $usage" >&2; exit 2 ;;
esac
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
draw() {  # a stage: kind, seed, how many, views of each
    start "$1$2" "$python" "sample/$1.py" --root "$folder/$1/$2" --seed "$2" --instances "$(scaled "$3" 1)" --views "$4"
}

# The autoencoder sees both kinds: things have surfaces as rich as photographed ones. What the prior sees beside that is
# drawn meanwhile.
draw things 1 2000 8
finish things1 $!
draw toys 1 $toys 16
finish toys1 $!
draw "${more[@]}"
drawn=$!
start vae "$python" train.py vae --root "$folder"/{toys,things}/1 --category toys things --preset "$preset" \
    --out "$folder/vae.pt" --steps "$(scaled 8000 2)" --set batch="$(scaled 64 2 64)" "${@:4}"
finish vae $!
finish "${more[0]}2" $drawn

start prior "$python" train.py prior --root "$folder"/{toys,things}/* --category "${categories[@]}" \
    --vae "$folder/vae.pt" --out "$folder/$name.pt" --steps "$(scaled $steps 2)" \
    --set batch="$(scaled 16 2 16)" rough=$rough
finish prior $!
echo "[$SECONDS s] $folder/$name.pt"
