#!/bin/sh
# The main job from end to end with the embedded default model, in a store of its
# own that is thrown away at the end.
set -eu
cd "$(dirname "$0")"

PROMPTCACHE_DIR=$(mktemp -d)
export PROMPTCACHE_DIR
trap 'rm -rf "$PROMPTCACHE_DIR"' EXIT

run() {
    printf '\n$ promptcache %s\n' "$1" >&2
    eval "promptcache $1"
}

sampling="--temp 0.7 --seed 11 --max-tokens 60"

run "generate -s @narrator.txt 'I open the door' $sampling --usage --no-cache"
run "build -s @narrator.txt --name narrator"
run "generate -s @narrator.txt 'I open the door' $sampling --usage"
run "generate -s @narrator.txt 'I light my torch' $sampling --usage"
run "ls"
run "prune --dry-run"
