#!/usr/bin/env bash
# The memory core's tests under Miri: those that ask no operating system for anything. shuttle changes
# stacks by itself, which Miri cannot follow: the interleavings are left out. So is what takes hours there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CARGO=${CARGO:-cargo}
if ! $CARGO +nightly miri --version >/dev/null 2>&1; then
    echo "********** SKIPPED: Miri is not installed: rustup +nightly component add miri rust-src **********"
    exit 0
fi
# The clock and the environment are read; nothing else is asked for.
export MIRIFLAGS="-Zmiri-disable-isolation ${MIRIFLAGS:-}"
export SALP_MODEL_CASES=${SALP_MODEL_CASES:-3}
exec $CARGO +nightly miri test --package salp --lib -- \
    words:: board:: frames:: tables:: family:: space:: --skip space::tests::races --skip planted --skip reach_all
