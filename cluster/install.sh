#!/bin/bash
# Install the shipped wheel on this host, into ~/mixmo/venv. Again does nothing, unless another wheel was shipped.
set -euo pipefail
cd ~/mixmo

if [ ! -s ~/.ray/auth_token ]; then
    echo "mixmo: no token was shipped. On your own machine: ray get-auth-token --generate, then ray up again" >&2
    exit 2
fi
chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token # rsync brings the rights it had, and Ray writes it readable by all

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "mixmo: $(python3 --version) on $(hostname); it needs 3.11 or newer, the same on every host" >&2
    exit 2
}
# `ray down` and `ray exec` type `ray` into a login shell, last in whose path it is.
path='export PATH="$PATH:$HOME/mixmo/venv/bin" # mixmo: for `ray down`'
grep -qxF "$path" ~/.bashrc 2>/dev/null || echo "$path" >> ~/.bashrc
wheel=dist/$(cat dist/wheel 2>/dev/null || true) # by its name: what an earlier `ray up` shipped lies there still
if [ ! -f "$wheel" ]; then
    echo "mixmo: no wheel was shipped. On your own machine: make wheel, then ray up again" >&2
    exit 2
fi
shipped=$(cat dist/constraints.txt "$wheel" | sha256sum)
if [ "$(cat venv/shipped 2>/dev/null || true)" = "$shipped" ]; then
    exit 0
fi
[ -x venv/bin/python ] || python3 -m venv venv
pip=(venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint dist/constraints.txt)
"${pip[@]}" "$wheel[optuna]"                     # any sweep may ask for it
"${pip[@]}" --force-reinstall --no-deps "$wheel" # the number of a version may stand for other code than last time
echo "$shipped" > venv/shipped
