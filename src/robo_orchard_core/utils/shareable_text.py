"""Text to share with others: without tokens, passwords and home folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REMOVED = "(removed)"

_TOKENS = re.compile(
    r"\b(?:(?:hf|ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}|sk-(?=[\w-]*\d)[\w-]{20,}|pypi-AgE[\w-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}\b|AIza[\w-]{30,})"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"  # JSON web token
    r"|-----BEGIN[A-Z ]* PRIVATE KEY-----[\s\S]*?(?:-----END[A-Z ]* PRIVATE KEY-----|\Z)"
)
_OF_URL = re.compile(r"(?<=://)[^\s/@]*:[^\s/@]+(?=@)")  # user:password
# A vocabulary has names such as pad_token, and values such as <s> and [CLS].
_OWNERS = "api|auth|access|bearer|bot|git(?:hub|lab)|hf|hub|huggingface|login|refresh|user|wandb"
_SECRET = (
    rf"(?:(?:{_OWNERS})[_-]?token|(?<![\w-])token|(?<=--)token|secret|password|passwd|credentials?"
    r"|(?:api|access|private|secret)[_-]?key)"
)
_VALUE = r"[^\s\"'<\[{(,;}\])][^\s\"',;}\])]{7,}"
_ASSIGNED = re.compile(
    rf"(?i)(?P<name>[\w.-]*{_SECRET}[\"']?(?:[ \t]*=[ \t]*|:[ \t]+|:(?=[\"']))[\"']?)"
    rf"(?P<value>{_VALUE})"
)
_OPTION = re.compile(rf"(?i)(?P<name>--[\w.-]*{_SECRET}[ \t]+[\"']?)(?P<value>{_VALUE})")
_NAME = re.compile(rf"(?i).*{_SECRET}")
_VARIABLE = re.compile(r"(?i).*(?:token|secret|passw|credential|key|auth(?!or)).*")
_SHORTEST = 8  # characters of a secret; shorter values occur in other text
_HOME = re.compile(
    r"(?<![\w.~-])(?:/(?:var/)?home/[^/\s\"':]+|/Users/[^/\s\"':]+|/root(?=[/\s\"':,]|$)"
    r"|[A-Za-z]:\\Users\\[^\\\s\"':]+)"
)


def without_secrets(text: str) -> str:
    """Return text without tokens, passwords and values of secret environment variables.

    Removed: tokens of known forms, such as ``hf_...``; passwords in URLs; values of names such as
    ``hub_token``, ``password`` and ``api_key``; values of environment variables with such names.

    >>> without_secrets("train.py --wandb.api_key 0123456789abcdef --lr 0.1")
    'train.py --wandb.api_key (removed) --lr 0.1'
    >>> without_secrets("postgresql://me:letmein@db/sweeps, eos_token: '<|endoftext|>'")
    "postgresql://(removed)@db/sweeps, eos_token: '<|endoftext|>'"
    """
    return _without(text, _secret_values())


def shareable_text(text: str) -> str:
    """Return text without secrets, and with ``~`` in place of home folders.

    >>> shareable_text("/home/anna/envs/a/bin/python train.py --data /data/robots")
    '~/envs/a/bin/python train.py --data /data/robots'
    """
    return _shareable(text, _secret_values(), os.path.expanduser("~"))


def shareable(value: Any) -> Any:
    """Return JSON-compatible data with shareable texts; embedded files (``data:``) stay.

    >>> shareable({"hub_token": "0123456789", "steps": 3, "at": ["/home/anna/data"]})
    {'hub_token': '(removed)', 'steps': 3, 'at': ['~/data']}
    """
    secrets, home = _secret_values(), os.path.expanduser("~")

    def convert(value: Any) -> Any:
        if isinstance(value, str):
            return value if value.startswith("data:") else _shareable(value, secrets, home)
        if isinstance(value, Mapping):
            return {
                key: REMOVED if _is_secret(key, part) else convert(part)
                for key, part in value.items()
            }
        return [convert(part) for part in value] if isinstance(value, (list, tuple)) else value

    return convert(value)


def _is_secret(name: Any, value: Any) -> bool:
    is_text = isinstance(name, str) and isinstance(value, str)
    return is_text and bool(_NAME.fullmatch(name)) and bool(re.fullmatch(_VALUE, value))


def find_secret(text: str) -> int | None:
    """Return the number of the first line with a secret, from 1, or None.

    >>> find_secret("name: a\\nhub_token: hf_abcdefghijklmnopqrst\\n")
    2
    """
    if without_secrets(text) == text:
        return None
    lines = text.splitlines()
    return next((n for n, line in enumerate(lines, 1) if without_secrets(line) != line), 1)


def _secret_values() -> list[str]:
    """Return the values of environment variables with names of secrets."""
    return [
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _VARIABLE.fullmatch(name) and not value.startswith("/")
    ]


def _without(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REMOVED)
    text = _OF_URL.sub(REMOVED, _TOKENS.sub(REMOVED, text))
    for pattern in (_ASSIGNED, _OPTION):
        text = pattern.sub(lambda found: found["name"] + REMOVED, text)
    return text


def _shareable(text: str, secrets: list[str], home: str) -> str:
    text = _without(text, secrets)
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return _HOME.sub("~", text)
