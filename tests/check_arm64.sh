#!/usr/bin/env bash
# The package on an emulated 64-bit ARM: a Debian root, wheels for aarch64, the extension cross-compiled. What
# tests/fingerprint.py prints of the demo model there must be what it prints here, bit for bit, on each instruction set.
#
#     tests/check_arm64.sh [FOLDER]      FOLDER is kept, so that a second run need not fetch everything again
#
# Needs Debian, root (for debootstrap), debootstrap, qemu-user and gcc-aarch64-linux-gnu; PYTHON is one of version 3.11
# with phi3c and its build tools, by default that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/arm64}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
root=$folder/root site=$folder/site

if [ ! -e "$root/usr/bin/python3.11" ]; then
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libpython3.11-dev bookworm "$root" >/dev/null
    for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
fi

if [ ! -e "$site" ]; then
    requirements=$("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])')
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --target "$site" --python-version 3.11 --implementation cp \
        --abi cp311 --abi abi3 --abi none --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 \
        --only-binary=:all: $requirements
fi

rm -rf "$folder/lib"
mkdir "$folder/lib"
cp -r src/phi3c "$folder/lib"
rm -f "$folder"/lib/phi3c/*.so
# The headers of the root come first: pyconfig.h is a machine's own.
CC=aarch64-linux-gnu-gcc LDSHARED="aarch64-linux-gnu-gcc -shared" _PYTHON_HOST_PLATFORM=linux-aarch64 \
    CFLAGS="-I$root/usr/include -I$root/usr/include/python3.11" \
    "$python" setup.py -q build_ext --build-temp "$folder/temp" --build-lib "$folder/lib"

model=$(PYTHONPATH=src "$python" -c 'from phi3c import hub; print(hub.demo())')
expected=$(PYTHONPATH=src "$python" tests/fingerprint.py "$model")
printf '%s\n' "$expected"
for on in cortex-a72:neon neoverse-n1:dotprod; do
    found=$(PHI3C_ISA=${on#*:} PYTHONPATH=$folder/lib:$site qemu-aarch64 -cpu "${on%:*}" -L "$root" \
        "$root/usr/bin/python3.11" tests/fingerprint.py "$model")
    if [ "$found" != "$expected" ]; then
        printf 'error: on %s:\n%s\n' "$on" "$found" >&2
        exit 1
    fi
done
echo "the same"
