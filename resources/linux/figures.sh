#!/bin/bash
# Boots the Linux guest, forks it ten times while it runs, and prints a table of how long that took. Uses
# target/release/salp, or the salp that is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

salp=${1:-target/release/salp}
guest=target/linux-guest
name=linux-figures-$$
trap '"$salp" stop "$name" >/dev/null 2>&1 || true; rm -f "$clones"' EXIT
clones=$(mktemp)

now_ms() {
    echo $(($(date +%s%N) / 1000000))
}

# until_line VM PATTERN: waits for a line on a VM's console, not for the end of whoever reads it.
until_line() {
    grep -q -m 1 "$2" < <(timeout 300 "$salp" console "$1")
}

if grep -q -m 1 -E '^flags.* (vmx|svm)( |$)' /proc/cpuinfo; then
    kind="KVM by hardware"
else
    kind="KVM in software"
fi
begun=$(now_ms)
"$salp" run --detach --name "$name" --memory 192M --kernel "$guest/vmlinux" --initrd "$guest/witness.cpio" \
    --cmdline "$(cat "$guest/command-line")" >/dev/null
until_line "$name" INIT-REACHED
booted=$(now_ms)
until_line "$name" '^step 1 ok'
ready=$(now_ms)
for number in 1 2 3 4 5 6 7 8 9 10; do
    forked=$(now_ms)
    figures=$("$salp" fork "$name" --name "$name-$number")
    until_line "$name-$number" '^step [0-9]* ok'
    echo "$figures first_line $(($(now_ms) - forked)) ms" >>"$clones"
    "$salp" stop "$name-$number"
done
# median FIELD: of the clones' lines "NAME pause P us call C us first_line F ms".
median() {
    awk -v field="$1" '{ print $field }' "$clones" | sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'
}
echo "Linux 6.12, 192 MiB, 1 vCPU; $(uname -sr), $(nproc) cores, $kind, load $(cut -d ' ' -f 1 /proc/loadavg)"
echo
echo "| what | how long |"
echo "|---|---|"
echo "| boot: \`salp run\` to the first line of its init | $((booted - begun)) ms |"
echo "| its program fills 100 MiB and verifies it | $((ready - booted)) ms |"
echo "| fork, median of 10: pause | $(median 3) us |"
echo "| fork, median of 10: call to the clone's \`KVM_RUN\` | $(median 6) us |"
echo "| fork, median of 10: \`salp fork\` to a line with which the clone has verified its 100 MiB | $(median 9) ms |"
