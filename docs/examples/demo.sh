#!/bin/sh
# The main job from end to end with the embedded default model, in a store of its
# own that is thrown away at the end.
set -eu
cd "$(dirname "$0")"

PROMPTCACHE_DIR=$(mktemp -d)
export PROMPTCACHE_DIR
trap 'rm -rf "$PROMPTCACHE_DIR"' EXIT

run() {
    printf '\n$ promptcache %s\n' "$*"
    promptcache "$@"
}

run generate -s @narrator.txt "I open the door" --max-tokens 40 --usage --no-cache
run build -s @narrator.txt --name narrator
run generate -s @narrator.txt "I open the door" --max-tokens 40 --usage
run generate -s @narrator.txt "I light my torch" --max-tokens 40 --usage
run ls
run prune --dry-run
