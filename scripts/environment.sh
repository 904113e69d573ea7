# Make an environment for the project. The scripts next to this file read it; do not run it:
#
#     source scripts/environment.sh
#     make_environment          # now "$python" is a Python that has the project installed
#
#     make_environment          .venv         versions of requirements/locked.txt
#     make_environment oldest   .venv-oldest  versions of requirements/oldest.txt; needs Python 3.11
#     make_environment newest   .venv-newest  newest releases that pip finds, upgraded on each call
#
# An environment stays as it is while pyproject.toml and requirements/ stay the same. When they change,
# pip updates the environment. After an interrupted installation, or when its Python is gone or the
# checkout has moved, the environment is created again.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
pythons="python3.11 python3.12 python3.13 python3" # that can make an environment; the first serves

unset PYTHONPATH PYTHONHOME # they would bring in other packages than those installed here

stop() {
    printf '%s\n' "$*" >&2
    exit 1
}

make_environment() {
    local versions=${1:-locked} wanted
    extras=vision,dev,interchange
    environment=$checkout/.venv
    pip_options=(--constraint "$checkout/requirements/$versions.txt")
    case $versions in
        oldest) environment+=-oldest pythons=python3.11 extras=vision,dev ;;
        newest) environment+=-newest pip_options=(--upgrade --upgrade-strategy eager) ;;
    esac
    python=$environment/bin/python
    made_for=$environment/made-for     # digest of the input files, and the folder; written last
    unfinished=$environment/unfinished # exists while the environment changes

    if command -v flock >/dev/null; then # one script at a time; unlocked when closed
        exec 9<"$checkout/scripts/environment.sh"
        flock 9
    fi
    wanted="$(cat "$checkout/pyproject.toml" "$checkout"/requirements/*.txt | cksum | tr ' ' '-') $checkout"
    if [ "$versions" = newest ] || [ -e "$unfinished" ] ||
        [ "$(cat "$made_for" 2>/dev/null)" != "$wanted" ]; then
        check_disk_space
        is_usable || create_environment
        install_project
        printf '%s\n' "$wanted" >"$made_for"
        rm "$unfinished"
    fi
    exec 9<&-
}

# Succeed if pip can install the project into the existing environment.
is_usable() {
    local made_in
    made_in=$(cut -d ' ' -f 2- "$made_for" 2>/dev/null) || made_in=$checkout
    [ ! -e "$unfinished" ] && [ "$made_in" = "$checkout" ] && version "$python" >/dev/null
}

create_environment() {
    find_system_python
    rm -rf "$environment"
    mkdir "$environment"
    touch "$unfinished"
    "$system_python" -m venv "$environment" || stop "$system_python could not make $environment, see above"
}

install_project() {
    local quiet=--quiet
    if [ -t 1 ]; then quiet=; fi
    touch "$unfinished"
    printf 'Installing the project and its requirements into %s (minutes, the first time)\n' "$environment"
    # Build with tools of the same versions: in isolation, pip builds with the newest.
    pip_install hatchling editables &&
        pip_install --no-build-isolation --editable "$checkout[$extras]" ||
        stop "pip could not install the project, see above; run this again when that is repaired"
}

pip_install() {
    "$python" -m pip install --disable-pip-version-check $quiet "${pip_options[@]}" "$@"
}

# Set system_python to the first of $pythons that is 3.11 or newer and can make environments.
find_system_python() {
    local candidate found incapable=
    for candidate in $pythons; do
        found=$(version "$candidate") || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            system_python=$candidate
            return
        fi
        incapable=${incapable:-$found}
    done
    if [ -n "$incapable" ]; then
        stop "missing: the venv module of Python $incapable; as root: apt-get update && apt-get install -y python$incapable-venv"
    fi
    if [ "$pythons" = python3.11 ]; then
        stop "missing: Python 3.11, which the oldest releases require; install it with its venv module"
    fi
    stop "missing: Python 3.11 or newer; as root: apt-get update && apt-get install -y python3 python3-venv"
}

# Print the version of a Python, such as 3.11. Fail if it is too old or does not start.
version() {
    "$1" -c '
import sys
if sys.version_info < (3, 11):
    sys.exit(1)
print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

check_disk_space() {
    local free_mib
    free_mib=$(($(df -Pk "$checkout" | awk 'NR == 2 { print $4 }') / 1024))
    if [ "$free_mib" -lt 3072 ]; then
        stop "missing: disk space; $checkout has $free_mib MiB free and needs 3072: make room there"
    fi
}
