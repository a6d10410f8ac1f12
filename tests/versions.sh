#!/usr/bin/env bash
# The tests on the oldest PyTorch that requirements.txt admits, on 2.13.0 and on the newest; by hand,
# before a release:  bash tests/versions.sh [FOLDER for the virtual environments]
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
for torch in "torch==2.6.0" "torch==2.13.0" "torch"; do
    venv="$folder/$torch"
    test -d "$venv" || python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check "$torch" -r "$root/requirements.txt"
    "$venv/bin/python" -c "import sys, torch; print(sys.version.split()[0], torch.__version__)"
    (cd "$root" && "$venv/bin/python" -m pytest -q -p no:cacheprovider | tail -n 3)
done
