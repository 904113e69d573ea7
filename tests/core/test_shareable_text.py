"""Text for others has no secrets."""

from __future__ import annotations

import os

import pytest

from robo_orchard_core.utils.shareable_text import (
    find_secret,
    shareable,
    shareable_text,
    without_secrets,
)

HF = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"train.py {HF}", "train.py (removed)"),
        ("WANDB_API_KEY=0123456789abcdef python a.py", "WANDB_API_KEY=(removed) python a.py"),
        ("--hub.token 'abcdefgh12' --lr 1", "--hub.token '(removed)' --lr 1"),
        ("--token abcdefgh12", "--token (removed)"),
        ("db_password: hunter2hunter2\nlr: 1", "db_password: (removed)\nlr: 1"),
        ('{"hf_token": "abcdefgh12"}', '{"hf_token": "(removed)"}'),
        ("mysql://a:b@c/d", "mysql://(removed)@c/d"),
        ("key ghp_" + "a1" * 12, "key (removed)"),
        ("aws AKIAABCDEFGHIJKLMNOP", "aws (removed)"),
        ("-----BEGIN RSA PRIVATE KEY-----\nx\n-----END RSA PRIVATE KEY-----", "(removed)"),
    ],
)
def test_secrets_are_removed(text: str, expected: str) -> None:
    """A token, a password, or the value of a secret name is replaced, and the rest stays."""
    assert without_secrets(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "pad_token: '<pad>', eos_token: endoftext",
        "max_tokens: 1234567890",
        "token:\n  class_type: Tokenizer",
        "the token embeddings of tokenizer: bert-base-cased",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "https://huggingface.co/docs/hub/repositories",
        "hf_transformers_language_model, sk-learn-contrib-packages, ASIA-Pacific-region-data",
        '{"password":4321,"secret": 50256}',
    ],
)
def test_other_text_stays(text: str) -> None:
    """Names of a vocabulary, counts, commits and addresses are no secrets."""
    assert without_secrets(text) == text
    assert find_secret(text) is None


def test_values_of_the_environment_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of a variable with a secret name is removed wherever it occurs."""
    monkeypatch.setenv("MY_SERVICE_TOKEN", "opaque-value-77")
    monkeypatch.setenv("OTHER", "ordinary-value-78")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "ordinary-value-78")
    assert without_secrets("a opaque-value-77 b ordinary-value-78") == (
        "a (removed) b ordinary-value-78"
    )
    assert find_secret("first\nsecond opaque-value-77") == 2


def test_home_folders_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder is written as ~, this user's and others'; other paths stay."""
    monkeypatch.setenv("HOME", "/scratch/people/anna")
    text = "/scratch/people/anna/a /home/bob/b '/Users/eve/c' /root/d /data/home/x"
    text += " /scratch/people/annabel"
    assert shareable_text(text) == ("~/a ~/b '~/c' ~/d /data/home/x /scratch/people/annabel")
    assert os.path.expanduser("~") not in shareable_text(text).split()


def test_data_is_converted_at_any_depth() -> None:
    """Texts in lists and mappings are converted; numbers and embedded files stay."""
    data = {"a": [HF, 3, None], "api_key": "abcdefgh", "image": "data:image/png;base64,/home/x/"}
    assert shareable(data) == {
        "a": ["(removed)", 3, None],
        "api_key": "(removed)",
        "image": "data:image/png;base64,/home/x/",
    }
