# What Ray and mixmo find on every host of a cluster. Sourced before `ray start`, so that all that Ray starts has it.

export PATH="$HOME/mixmo/venv/bin:$PATH"
export MIXMO_PYTHON="$HOME/mixmo/venv/bin/python" # of jobs: ~/.bashrc may put another first in PATH, see submit.py

# Whoever reaches Ray's ports runs code on every host: they ask for the token that cluster/*.yaml ships. It is said here
# because `ray start` alone would take one that lies there, and `ray status` beside it would not (Ray 2.60).
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0

# Each process of Ray holds a connection to many others; where so many files are not allowed, as many as are.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"

# A cut of the network that is shorter than two minutes costs no trial: 12 checks, 10 s apart. Ray's own is 15 s.
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-10000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-12}
# And so long workers wait for a head that restarts.
export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-120}

# The processes of a gang find each other on the interface of the default route. Left to itself, gloo asks for the
# host's name, which often means 127.0.0.1: then no gang of two hosts can form.
_interface=$(ip -o -4 route show to default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)
if [ -n "$_interface" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$_interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$_interface}
fi

# One thread of arithmetic for each process: two pools under load slow each other down twentyfold.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}

# On the head of cluster/gpu.yaml: where results and images lie, for `mixmo` typed there and for jobs that do not say.
if [ -s "$HOME/mixmo/bucket" ]; then
    _bucket=$(cat "$HOME/mixmo/bucket")
    _region=$(sed -n 's/.*"region": "\([^"]*\)".*/\1/p' "$HOME/ray_bootstrap_config.yaml" 2>/dev/null | head -n 1)
    export MIXMO_RESULTS="s3://$_bucket/results${_region:+?region=$_region}"
    export MIXMO_DATA="s3://$_bucket/data${_region:+?region=$_region}"
fi
