# Makes the project's environment. Read by the scripts beside it, not run:
#
#     source scripts/environment.sh
#     make_environment        # afterwards "$python" is a Python that has the project installed
#
# The environment is .venv in the checkout. It is used as it is while pyproject.toml stays as it
# was, brought up to date when that has changed, and made anew when making it was cut off half-way,
# when its Python is gone, or when the checkout has moved.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
environment=$checkout/.venv
python=$environment/bin/python
made_for=$environment/made-for     # which pyproject.toml, in which folder; written last of all
unfinished=$environment/unfinished # there while the environment is being changed

unset PYTHONPATH PYTHONHOME # they would bring in other packages than those installed here

stop() {
    printf '%s\n' "$*" >&2
    exit 1
}

make_environment() {
    local wanted
    wanted="$(cksum <"$checkout/pyproject.toml" | tr ' ' '-') $checkout"
    if command -v flock >/dev/null; then # one script at a time; unlocked when closed
        exec 9<"$checkout/scripts/environment.sh"
        flock 9
    fi
    if [ -e "$unfinished" ] || [ "$(cat "$made_for" 2>/dev/null)" != "$wanted" ]; then
        check_disk_space
        is_usable || create_environment
        install_project
        printf '%s\n' "$wanted" >"$made_for"
        rm "$unfinished"
    fi
    exec 9<&-
}

# Whether the project can be installed into the environment as it is.
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
    printf 'Installing the project and what it needs into %s (minutes, the first time)\n' "$environment"
    "$python" -m pip install --disable-pip-version-check $quiet --editable "$checkout[vision,dev]" ||
        stop "pip could not install the project, see above; run this again when that is repaired"
}

# Sets system_python to the first Python >= 3.11 that can make environments.
find_system_python() {
    local candidate found incapable=
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
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
    stop "missing: Python 3.11 or newer; as root: apt-get update && apt-get install -y python3 python3-venv"
}

# The version of a Python, such as 3.11; fails where it is too old or does not start.
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
