"""Credentials kept out of what is recorded: names and values that look like secrets, and flat parameters.

Redaction is a net under the habit of never passing secrets as parameters, not a replacement for it.
"""

import dataclasses
import enum
import json
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
MAX_VALUE_LENGTH = 6000
"""Characters MLflow keeps of a parameter's value."""
MAX_KEY_LENGTH = 250

_SECRET_WORDS = frozenset(
    [
        "token",
        "password",
        "passwd",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
        "key",
        "apikey",
        "credential",
        "credentials",
        "authorization",
    ]
)
_NAMES = (
    r"(?<![A-Za-z])(?:(?:access|auth|api)?token|password|passwd|passphrase|pwd|secret|(?:api|access|secret)[_-]?key"
    r"|credentials?|sig|signature)\d*(?![A-Za-z])"
)
_SECRET_VALUES = (
    (re.compile(r"(://)[^/\s\"']+@"), rf"\1{REDACTED}@"),
    (re.compile(rf"({_NAMES}[\w-]*[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;}}]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(rf"(--[\w-]*?{_NAMES}\s+[\"']?)[^\s\"'-][^\s\"']*", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}"), rf"\1 {REDACTED}"),
    (
        re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|ASIA)[A-Za-z0-9_-]{12,}"),
        REDACTED,
    ),
)


def redact(text: str) -> str:
    """`text` without credentials: user:password in URIs, `token=…`-like assignments, known key formats."""
    for pattern, replacement in _SECRET_VALUES:
        text = pattern.sub(replacement, text)
    return text


def is_secret_name(name: str) -> bool:
    """True where a word of `name` (split at dots, dashes, underscores and capitals) names a secret.

    `hf_token` and `apiKey` do; `tokenizer`, `num_tokens` and `keypoints` do not.
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return any(word.lower() in _SECRET_WORDS for word in words)


def flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings and dataclasses as `{"a.b": text}`, redacted, each value within MLflow's length.

    Sequences become JSON. A value that is cut ends with a note of its full length.
    """
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        key = f"{prefix}{name}"
        if is_secret_name(str(name)):
            flat[key] = REDACTED
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat[key] = type(value).__name__
            flat |= flatten({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, f"{key}.")
        elif isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = shorten(redact(_text(value)), MAX_VALUE_LENGTH)
    return {tracked_name(key): value for key, value in flat.items()}


def tracked_name(name: str) -> str:
    """`name` with the characters and the length that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_KEY_LENGTH]


def _text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, (list, tuple)):
        return json.dumps([plain(item) for item in value], ensure_ascii=False)
    return str(value)


def plain(value: Any) -> Any:
    """`value` as JSON data without secrets: dataclasses become mappings with their type, the rest text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): REDACTED if is_secret_name(str(k)) else plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def shorten(text: str, length: int) -> str:
    """`text` of at most `length` characters; a cut one ends with its full length."""
    note = f" … [cut, {len(text)} characters in all]"
    return text if len(text) <= length else text[: length - len(note)] + note
