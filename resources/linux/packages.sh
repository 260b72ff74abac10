# For the scripts beside this one: Debian packages that are needed here, or only looked into.
# Everything says "linux-guest: " on standard error when it fails, and ends the script.

fail() {
    echo "linux-guest: error: $*" >&2
    exit 1
}

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null
}

# have_apt: without it there is no source of anything.
have_apt() {
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        fail "there is no apt-get: Debian's packages cannot be fetched"
}

# install_packages PACKAGE...: installs what is missing, where this runs as root.
install_packages() {
    [ $# -gt 0 ] || return 0
    have_apt
    [ "$(id -u)" -eq 0 ] || fail "not installed: $*; install them, or run this as root"
    echo "linux-guest: installing $*"
    { apt install -y --no-install-recommends "$@" || { apt update && apt install -y --no-install-recommends "$@"; }; } \
        >/dev/null || fail "cannot install $*"
}

# fetch_package PACKAGE DIRECTORY: prints the path of its .deb file, from DIRECTORY if it is there. Nothing
# is installed. A download that is interrupted leaves nothing in DIRECTORY.
fetch_package() {
    for deb in "$2/$1"_*.deb; do
        [ -f "$deb" ] && { echo "$deb"; return; }
    done
    have_apt
    fetch=$(mktemp -d "$2/fetch.XXXXXX")
    # Unsandboxed: apt's own user cannot write to the caller's directories.
    if ! (cd "$fetch" && apt -o APT::Sandbox::User=root download "$1") >&2; then
        [ "$(id -u)" -eq 0 ] && apt update >&2 || true
        (cd "$fetch" && apt -o APT::Sandbox::User=root download "$1") >&2 || {
            rm -rf "$fetch"
            fail "apt-get has no package $1, or cannot download it (Debian 12 with its security updates has it)"
        }
    fi
    mv "$fetch"/*.deb "$2"
    rmdir "$fetch"
    echo "$2/$1"_*.deb
}
