# Sourced by run_local.sh, run_tests.sh and run_dist.sh: makes the environment .venv in this
# checkout, once, and leaves its interpreter in $PYTHON. A second call costs one file comparison.
#
# PYTHON=/path/to/python3.x ./run_local.sh   chooses the interpreter of a new environment.
# GLORE_GPU=1 ./run_local.sh                 makes and uses .venv-gpu, for an NVIDIA GPU.

glore_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case "${GLORE_GPU:-0}" in
0 | no | false) glore_gpu= glore_venv="$glore_root/.venv" ;;
*) glore_gpu=1 glore_venv="$glore_root/.venv-gpu" ;;
esac
glore_stamp="$glore_venv/.requirements-installed"

glore_fail() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

glore_python_fits() { # interpreter -> success when it is CPython 3.9 to 3.13
    "$1" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

glore_find_python() { # prints an interpreter, or nothing
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        glore_python_fits "$PYTHON" || glore_fail "PYTHON=$PYTHON is not a Python 3.9 to 3.13," \
            "which is what MXNet 1.9.1 runs on. Unset PYTHON to let this script look for one."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python python3.11 python3.12 python3.13 python3.10 python3.9 \
        "${HOME:-/}"/.pyenv/versions/3.{11,12,13,10,9}*/bin/python; do
        if command -v "$candidate" >/dev/null 2>&1 && glore_python_fits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

glore_make_venv() {
    local python name=${glore_venv##*/}
    python=$(glore_find_python) || exit 1
    if [ -n "$python" ]; then
        echo "Making the environment $name with $("$python" --version 2>&1) ($python)" >&2
        if ! "$python" -m venv --clear "$glore_venv" >/dev/null 2>&1; then
            # Debian's python3 comes without ensurepip; uv and virtualenv need none.
            if command -v uv >/dev/null 2>&1; then
                uv venv --quiet --clear --python "$python" "$glore_venv" || exit 1
            else
                "$python" -m virtualenv --clear --quiet "$glore_venv" 2>/dev/null ||
                    glore_fail "$python cannot make a virtual environment. On Debian or Ubuntu:" \
                        "apt-get install python3-venv; or install uv."
            fi
        fi
    elif command -v uv >/dev/null 2>&1; then
        echo "No Python 3.9 to 3.13 found; asking uv for one" >&2
        uv venv --quiet --clear --python '>=3.9,<3.14' "$glore_venv" ||
            glore_fail "uv could not provide a Python 3.9 to 3.13."
    else
        glore_fail "no Python 3.9 to 3.13 found (python3 is" \
            "$(python3 --version 2>&1 || echo missing)). MXNet 1.9.1 runs on no other one." \
            "Install e.g. python3.11 or uv (which brings its own), or name an interpreter:" \
            "PYTHON=/path/to/python3.11 $0"
    fi
}

glore_requirements() { # prints what the environment holds
    local line
    if [ -z "$glore_gpu" ]; then
        cat "$glore_root/requirements.txt"
        return
    fi
    while IFS= read -r line; do
        case "$line" in mxnet==*) ;; *) printf '%s\n' "$line" ;; esac
    done <"$glore_root/requirements.txt"
    cat "$glore_root/requirements-gpu.txt"
}

glore_check_driver() {
    if [ -n "$glore_gpu" ]; then
        "$glore_venv/bin/python" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null && return
        [ -e "$glore_stamp" ] || rm -rf "$glore_venv"
        glore_fail "GLORE_GPU is set, but this machine has no NVIDIA driver (libcuda.so.1 is" \
            "not found). Install the driver, or unset GLORE_GPU to use the CPU."
    elif [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1; then
        echo "This machine has an NVIDIA driver; for MXNet on the GPU: GLORE_GPU=1 $0" >&2
    fi
}

glore_install() { # file with the requirements
    local size="400 MB"
    [ -z "$glore_gpu" ] || size="2.8 GB"
    echo "Installing the pinned packages of requirements.txt (about $size, once)" >&2
    if command -v uv >/dev/null 2>&1; then
        uv pip install --quiet --python "$glore_venv/bin/python" --no-deps -r "$1" ||
            glore_fail "the packages could not be installed; see uv's message above."
    else
        "$glore_venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
            -r "$1" ||
            glore_fail "the packages could not be installed; see pip's message above. A package" \
                "index must be reachable (PIP_INDEX_URL is honoured)."
    fi
}

if [ -x "$glore_venv/bin/python" ] && ! glore_python_fits "$glore_venv/bin/python"; then
    glore_fail "${glore_venv##*/} holds an unsupported or broken Python; remove it" \
        "(rm -r '$glore_venv') and run this again."
fi
if ! glore_requirements | cmp -s - "$glore_stamp"; then
    [ -w "$glore_root" ] || glore_fail "$glore_root is not writable for $(id -un), and its" \
        "environment is missing or out of date. Let its owner run this once, or use a copy."
    # One set-up at a time: two scripts started together must not install into one another.
    exec 9>"$glore_root/.venv.lock"
    if command -v flock >/dev/null 2>&1; then flock 9; fi
    if ! glore_requirements | cmp -s - "$glore_stamp"; then
        [ -x "$glore_venv/bin/python" ] || glore_make_venv
        glore_check_driver
        glore_requirements >"$glore_venv/requirements.txt"
        glore_install "$glore_venv/requirements.txt"
        mv "$glore_venv/requirements.txt" "$glore_stamp"
    fi
    exec 9>&-
fi
PYTHON="$glore_venv/bin/python"
