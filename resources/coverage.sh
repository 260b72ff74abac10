#!/usr/bin/env bash
# Line coverage of the memory core by its own tests: words, board, frames, tables, family, space,
# window, arena_files. Fails below 90 %. Installs cargo-llvm-cov where it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CORE=(words board frames tables family space arena_files window)
LIMIT_PERCENT=90
CARGO=${CARGO:-cargo}

fail() {
    echo "coverage: error: $*" >&2
    exit 1
}

# The compiler's own LLVM tools, or others that read what it writes.
find_tools() {
    local bin sysroot
    sysroot=$(rustc --print sysroot)
    for bin in "$sysroot"/lib/rustlib/*/bin /usr/lib/llvm-*/bin; do
        [[ -x $bin/llvm-cov && -x $bin/llvm-profdata ]] || continue
        if reads_profiles "$bin"; then
            export LLVM_COV=$bin/llvm-cov LLVM_PROFDATA=$bin/llvm-profdata
            echo "coverage: tools: $bin"
            return
        fi
    done
    fail "no LLVM tools that read this compiler's profiles: rustup component add llvm-tools, or Debian's llvm-19 or later"
}

reads_profiles() {
    local work result=0
    work=$(mktemp -d)
    echo 'fn main() {}' >"$work/empty.rs"
    rustc -Cinstrument-coverage "$work/empty.rs" -o "$work/empty" &&
        LLVM_PROFILE_FILE=$work/empty.profraw "$work/empty" &&
        "$1/llvm-profdata" merge "$work/empty.profraw" -o "$work/empty.profdata" 2>/dev/null &&
        "$1/llvm-cov" report "$work/empty" -instr-profile="$work/empty.profdata" >/dev/null 2>&1 || result=1
    rm -rf "$work"
    return $result
}

$CARGO llvm-cov --version >/dev/null 2>&1 || $CARGO install cargo-llvm-cov --locked
find_tools
# What is only for tests, and what lies above the core, is left out of the figures.
core=$(IFS='|'; echo "${CORE[*]}")
others=$(cd vmm/src && ls | sed 's/\.rs$//' | grep -vxE "$core" | paste -sd '|')
left_out="/vmm/src/($others)(/|\.rs)|/tests(/|\.rs)|/guest/|/rustc/|/registry/"
$CARGO llvm-cov --package salp --lib --ignore-filename-regex "$left_out" \
    --fail-under-lines "$LIMIT_PERCENT" -- "${CORE[@]/%/::}"
