#!/bin/sh
# Builds the Linux kernel of the Linux guest from Debian's package linux-source-6.12, changed by
# software-kvm.patch, as tiny.config says: vmlinux, bzImage, and the kernel's program gen_init_cpio. Prints the
# directory that has them, last.
#
# That directory is below $SALP_CACHE, $XDG_CACHE_HOME/salp or ~/.cache/salp, and its name has a hash of this
# script, the patch and the configuration: it is built once for all clones of this repository, 2 to 4 minutes
# on two cores. It gets its name when it is complete: an interrupted build leaves nothing that looks like one.
set -eu

PACKAGE=linux-source-6.12
here=$(cd "$(dirname "$0")" && pwd)
. "$here/packages.sh"

cache=${SALP_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/salp}
hash=$(cat "$here/kernel.sh" "$here/tiny.config" "$here/software-kvm.patch" | sha256sum | cut -c 1-16)
result=$cache/linux-$hash
if [ -d "$result" ]; then
    echo "$result"
    exit 0
fi

mkdir -p "$cache"
# One build at a time; who waited for another's finds it done.
exec 9>"$cache/lock"
flock 9
if [ -d "$result" ]; then
    echo "$result"
    exit 0
fi
# What killed builds left.
rm -rf "$cache"/build.* "$cache"/fetch.*

missing=
need() {
    command -v "$1" >/dev/null || missing="$missing $2"
}
need cc gcc
need make make
need flex flex
need bison bison
need bc bc
need perl perl
need patch patch
need xz xz-utils
need lz4 lz4
need ld binutils
command -v cc >/dev/null && echo '#include <libelf.h>' | cc -E - >/dev/null 2>&1 || missing="$missing libelf-dev libc6-dev"
# Package names have no spaces.
install_packages $missing >&2

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
echo "linux-guest: building Linux in $work, log in $cache/build.log" >&2
deb=$(fetch_package "$PACKAGE" "$cache")
mkdir "$work/linux" "$work/result"
# Only the archive of the source is taken out of the package; nothing is installed.
dpkg-deb --fsys-tarfile "$deb" | tar -xO --wildcards "./usr/src/$PACKAGE.tar.xz" |
    tar -xJ -C "$work/linux" --strip-components=1
cd "$work/linux"
export KBUILD_BUILD_USER=salp KBUILD_BUILD_HOST=salp
{
    patch -p1 <"$here/software-kvm.patch" &&
        make -s tinyconfig &&
        scripts/kconfig/merge_config.sh -m .config "$here/tiny.config" &&
        make -s olddefconfig &&
        make -s -j"$(nproc)" vmlinux bzImage
} >"$cache/build.log" 2>&1 </dev/null || {
    tail -n 20 "$cache/build.log" >&2
    fail "Linux was not built, see $cache/build.log"
}
cp vmlinux arch/x86/boot/bzImage usr/gen_init_cpio "$work/result"
mv -T "$work/result" "$result"
echo "$result"
