# Read by demo.sh and test.sh: one environment, .venv in the project's root, made on the first run.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="$root/.venv"

say() { printf '==> %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Prints the first Python that can make an environment and has packages of constraints.txt's torch.
find_python() {
    local candidate bare="" suits="import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))"
    for candidate in "${PYTHON:-python3}" python3 python3.{14,13,12,11} python; do
        "$candidate" -c "$suits" 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        bare="$candidate"
    done
    if [ -n "$bare" ]; then
        fail "$bare cannot make environments: install its venv module (Debian, Ubuntu: python3-venv)"
    fi
    fail "no Python of 3.11 to 3.14 found: install one, or name it with PYTHON=/path/to/python3"
}

# What the environment depends on; another value means that it must be installed again.
environment_key() {
    printf '%s | %s | %s' "$root" "$("$environment/bin/python" --version 2>&1)" \
        "$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
}

# prepare_environment [test]: after it $environment holds the package, with the test extra if asked.
prepare_environment() {
    local extra="${1:-}" python key found quiet=""
    if command -v flock >/dev/null; then
        exec 9<"$root/constraints.txt" # a second run waits here while the first one installs
        flock 9
    fi
    if [ -e "$environment/installing" ]; then
        say "the last installation was interrupted, starting over"
        rm -rf "$environment"
    fi
    if [ ! -e "$environment" ]; then
        python="$(find_python)"
        say "making $environment with $("$python" --version)"
        mkdir "$environment"
        touch "$environment/installing"
        "$python" -m venv "$environment"
    fi
    "$environment/bin/python" -c 'import pip' 2>/dev/null ||
        fail "$environment has no working Python with pip: remove that folder and run this again"
    key="$(environment_key)"
    found="$(cat "$environment/ready" 2>/dev/null || true)"
    if [ "$found" = "$key $extra" ] || [ "$found" = "$key test" ]; then
        say "environment $environment is ready"
    else
        say "installing qwen2audio${extra:+ and its $extra extra}: some minutes, with CUDA 3 GB to fetch and 6 GB of disk"
        touch "$environment/installing"
        [ -t 1 ] || quiet=--quiet
        "$environment/bin/python" -m pip install $quiet --disable-pip-version-check \
            --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}" ||
            fail "the installation failed: see above; the next run starts it over"
        printf '%s' "$key $extra" >"$environment/ready"
        rm "$environment/installing"
    fi
    exec 9<&-
}
