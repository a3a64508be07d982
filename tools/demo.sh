#!/usr/bin/env bash
# The main job on the embedded model, in the commands that a user would type: `make demo`.
# It makes ./out-awq and ./bench-results, and ends the server that it starts.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PWD/.venv/bin:$PATH
bold="" plain=""
if [ -t 1 ]; then
    bold=$(tput bold 2>/dev/null || true) plain=$(tput sgr0 2>/dev/null || true)
fi
log=$(mktemp "${TMPDIR:-/tmp}/mmq-demo-XXXXXX.log")
server=""

show() { printf '\n%s$ %s%s\n' "$bold" "$*" "$plain"; }

run() {
    show "$@"
    "$@"
}

stop_server() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=""
    fi
}
trap stop_server EXIT

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

run mmq quantize --method awq pebble -o out-awq --overwrite
run mmq check out-awq

show mmq serve out-awq --port "$port" "&"
mmq serve out-awq --port "$port" >"$log" 2>&1 &
server=$!
if ! python tools/ask.py --wait "$server" "http://127.0.0.1:$port/v1"; then
    echo "demo: the server's log ($log) ends:" >&2
    tail -n 5 "$log" >&2
    exit 3
fi
show kill "$server"
stop_server

run mmq bench --compare fp16 awq --quick

cat <<END

That was pebble, the model inside the package. The same on a model of yours:

    source .venv/bin/activate
    mmq recipes
    mmq quantize --method awq Qwen2-VL-2B-Instruct
    mmq check out-awq
    mmq serve out-awq
    mmq bench --compare fp16 awq
END
