#!/bin/sh
# Says in one line what is missing to install edged, and the line that brings it; then exit 2.
# Silent and 0 when everything is there.
#
#   sh scripts/prerequisites.sh [PYTHON]
#
# CMake is not asked for: pip's build isolation brings it where the machine has none.

missing=
packages=

lacks() { # what it is, what brings it
    missing="$missing, $1"
    packages="$packages $2"
}

has() { command -v "$1" >/dev/null 2>&1; }

has git || lacks git git
has g++ || lacks "g++ (the C++ compiler)" g++
has make || lacks make make

python=${1:-}
if [ -z "$python" ]; then
    python=python3
    has python3.11 && python=python3.11
fi
if ! has "$python"; then
    lacks "$python (Python 3.11 or newer)" "python3.11 python3.11-venv"
else
    # Debian splits ensurepip from the interpreter; what imports venv but not ensurepip cannot make one.
    came=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        lacks "Python 3.11 or newer ($python is ${came:-not one that starts})" "python3.11 python3.11-venv"
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        lacks "the venv module of Python $came" "python$came-venv"
    fi
fi

[ -z "$missing" ] && exit 0
echo "edged: needed to install and not found: ${missing#, }; install with: apt install$packages" >&2
exit 2
