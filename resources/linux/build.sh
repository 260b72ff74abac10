#!/bin/sh
# Builds the Linux guest: target/linux-guest/vmlinux, from Debian's package linux-source-6.12, and
# target/linux-guest/initramfs.cpio with an init that counts and prints.
# Cached: done again only if this directory changes. Downloads about 150 MB. Needs apt-get, xz, make, a C
# compiler, flex, bison, bc, and libelf's headers.
set -eu

PACKAGE=linux-source-6.12
here=$(cd "$(dirname "$0")" && pwd)
target=$here/../../target/linux-guest
mkdir -p "$target"
target=$(cd "$target" && pwd)

recipe=$(cat "$here/build.sh" "$here/tiny.config" "$here/software-kvm.patch" "$here/init.S" | sha256sum)
if [ -f "$target/vmlinux" ] && [ -f "$target/initramfs.cpio" ] &&
    [ "$(cat "$target/recipe" 2>/dev/null)" = "$recipe" ]; then
    echo "linux-guest: $target/vmlinux is up to date"
    exit 0
fi
for tool in apt-get dpkg-deb xz tar make cc flex bison bc patch perl; do
    command -v "$tool" >/dev/null || { echo "linux-guest: '$tool' is not installed" >&2; exit 1; }
done

work=$target/work
rm -rf "$work" "$target/recipe"
mkdir -p "$work"
cd "$work"
if ! ls "$target"/"$PACKAGE"_*.deb >/dev/null 2>&1; then
    (cd "$target" && apt-get download "$PACKAGE")
fi
# Only the archive of the source is taken out of the package; nothing is installed.
dpkg-deb --fsys-tarfile "$target"/"$PACKAGE"_*.deb | tar -x --wildcards "./usr/src/*.tar.xz"
mkdir linux
tar -xJf usr/src/"$PACKAGE".tar.xz -C linux --strip-components=1
cd linux
patch -p1 <"$here/software-kvm.patch"
make -s tinyconfig
scripts/kconfig/merge_config.sh -m .config "$here/tiny.config" >/dev/null
make -s olddefconfig
make -s -j"$(nproc)" vmlinux
cp vmlinux "$target/vmlinux"

# The initramfs: one static program and the console that it prints to, in the order that cpio gives.
cc -nostdlib -static -o "$work/init" "$here/init.S"
cat >"$work/list" <<LIST
dir /dev 755 0 0
nod /dev/console 600 0 0 c 5 1
file /init $work/init 755 0 0
LIST
usr/gen_init_cpio "$work/list" >"$target/initramfs.cpio"
cd "$target"
rm -rf "$work"
echo "$recipe" >"$target/recipe"
echo "linux-guest: built $target/vmlinux"
