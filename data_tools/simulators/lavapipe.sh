#!/bin/sh
# A Vulkan driver for ManiSkill: `lavapipe.sh FOLDER` unpacks Mesa's software driver of bookworm-backports into FOLDER on
# Debian 12, whose own is too old. It changes nothing outside FOLDER and needs no root.
set -eu
folder=$1
lacks() {
  echo "no Vulkan driver that ManiSkill can use: $1" >&2
  exit 0
}

if [ -f "$folder/lvp_icd.json" ] || nvidia-smi >/dev/null 2>&1; then exit 0; fi
installed=$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true)
if [ -n "$installed" ] && dpkg --compare-versions "$installed" ge 24.3; then exit 0; fi
. /etc/os-release
[ "$ID ${VERSION_ID-}" = "debian 12" ] || lacks "install Mesa 24.3 or later (Debian, Ubuntu: mesa-vulkan-drivers)"
command -v apt-get >/dev/null || lacks "apt-get is missing, with which Mesa's would be fetched"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/lib"
for suite in bookworm bookworm-backports; do
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main"
done >"$work/sources.list"
apt() {
  apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User="$(id -un)" "$@"
}
apt update || lacks "deb.debian.org cannot be reached"
(cd "$work" && apt download -t bookworm-backports mesa-vulkan-drivers libdrm2 libwayland-client0 &&
  apt download libllvm15 libx11-xcb1 libxcb1 libxcb-dri3-0 libxcb-present0 libxcb-randr0 libxcb-shm0 libxcb-sync1 \
    libxcb-xfixes0 libxshmfence1 libxau6 libxdmcp6 libbsd0 libmd0 libedit2 libz3-4 libxml2 libicu72 libexpat1 libzstd1 \
    libffi8 liblzma5 libtinfo6 zlib1g) || lacks "the packages cannot be fetched from deb.debian.org"
for package in "$work"/*.deb; do dpkg -x "$package" "$work/root"; done

# The driver, the drm library that it was made for, and what else this machine does not have.
mkdir -p "$folder/lib"
find "$work/root" -name "libvulkan_lvp.so" -exec cp {} "$folder/" \;
find "$work/root" -name "libdrm.so.2" -exec cp {} "$folder/lib/" \;
while missing=$(LD_LIBRARY_PATH="$folder/lib" ldd "$folder/libvulkan_lvp.so" | sed -n 's/^\s*\(\S*\) => not found/\1/p') &&
  [ -n "$missing" ]; do
  for library in $missing; do
    found=$(find "$work/root" -name "$library" | head -1)
    [ -n "$found" ] || lacks "$library is missing"
    cp -L "$found" "$folder/lib/"
  done
done
here=$(cd "$folder" && pwd)
echo "{\"ICD\": {\"api_version\": \"1.4.305\", \"library_path\": \"$here/libvulkan_lvp.so\"}, \"file_format_version\": \"1.0.0\"}" \
  >"$folder/lvp_icd.json"
