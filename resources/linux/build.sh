#!/bin/sh
# Makes the Linux guest, target/linux-guest:
#
#   vmlinux, bzImage   Linux 6.12 (see kernel.sh; from the cache if it was built before)
#   witness.cpio       initramfs: a program that keeps 100 MiB of checksummed memory (witness.c)
#   shell.cpio         initramfs: busybox, a shell on the serial console (shell-init)
#   command-line       the kernel's command line on a host whose KVM is software, fine on others
#
# Nothing of this is committed: Linux and busybox are under the GPL-2.0, and fetched from Debian.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
. "$here/packages.sh"
cache=${SALP_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/salp}
target=$here/../../target/linux-guest
mkdir -p "$target"
target=$(cd "$target" && pwd)

kernel=$("$here/kernel.sh")
work=$(mktemp -d "$target/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Each file gets its name when it is complete.
publish() {
    mv -T "$work/$1" "$target/$1"
}
ln -s "$kernel/vmlinux" "$kernel/bzImage" "$work"
publish vmlinux
publish bzImage
cp "$here/command-line" "$work"
publish command-line

# Plain x86-64 code: AVX registers are not saved with a vCPU where KVM is software.
cc -O2 -march=x86-64 -ffreestanding -fno-builtin -fno-tree-loop-distribute-patterns -fno-stack-protector \
    -fno-pie -no-pie -fno-asynchronous-unwind-tables -fcf-protection=none -Wall -Wextra -Werror \
    -nostdlib -static -o "$work/witness" "$here/witness.c"
devices="dir /dev 755 0 0
nod /dev/console 600 0 0 c 5 1
nod /dev/null 666 0 0 c 1 3
nod /dev/zero 666 0 0 c 1 5
nod /dev/tty 666 0 0 c 5 0
nod /dev/ttyS0 600 0 0 c 4 64
dir /proc 755 0 0
dir /tmp 777 0 0"
"$kernel/gen_init_cpio" - >"$work/witness.cpio" <<LIST
$devices
file /init $work/witness 755 0 0
LIST
publish witness.cpio

deb=$(fetch_package busybox-static "$cache")
dpkg-deb --fsys-tarfile "$deb" | tar -xO --wildcards '*/bin/busybox' >"$work/busybox"
{
    echo "$devices"
    echo "dir /bin 755 0 0"
    echo "file /bin/busybox $work/busybox 755 0 0"
    echo "file /init $here/shell-init 755 0 0"
    for applet in cat cp date dd df dmesg free grep head kill ls md5sum mkdir mount mv ps rm sed seq setsid sh \
        sleep stty tail top touch uname uptime vi wc; do
        echo "slink /bin/$applet busybox 777 0 0"
    done
} | "$kernel/gen_init_cpio" - >"$work/shell.cpio"
publish shell.cpio
echo "linux-guest: $target has vmlinux, bzImage, witness.cpio, shell.cpio and command-line"
