"""Filters: what `accepted` and `reject_reason` mean before, between and after curations, and keys of maps.

The stream writes `stream_reject_reason`; curation alone writes the nullable columns `accepted` and
`reject_reason`. A null `accepted` means that curation has not seen the row, and then the stream's verdict
holds. In queries the two names therefore always stand for these expressions, whether or not the table has
been curated; `Table.read` gives the stored values.
"""

import re

import pyarrow as pa

STREAM_VERDICT = "stream_reject_reason"
_TOKEN = re.compile(
    r"""'(?:[^']|'')*'        # string literal
      | "(?:[^"]|"")*"        # quoted text
      | `[^`]*`               # quoted identifier
      | [A-Za-z_][A-Za-z0-9_]*  # identifier or keyword
      | .""",
    re.VERBOSE | re.DOTALL,
)


def effective_expressions(schema: pa.Schema) -> dict[str, str]:
    """SQL of the effective verdicts of a synthetic table; empty for a table without a stream verdict."""
    if STREAM_VERDICT not in schema.names:
        return {}
    if "accepted" not in schema.names:
        return {"accepted": f"({STREAM_VERDICT} IS NULL)", "reject_reason": STREAM_VERDICT}
    reason = f"nvl2(cast(accepted as string), reject_reason, {STREAM_VERDICT})"
    return {
        "accepted": f"coalesce(accepted, {STREAM_VERDICT} IS NULL)",
        "reject_reason": reason if "reject_reason" in schema.names else STREAM_VERDICT,
    }


def whole_filter(filter_text: str) -> str:
    """The filter in brackets, fit to be joined to other conditions.

    Lance ignores what follows a complete expression, so that ``a) OR (b`` or a comment would undo what a filter is
    joined to.

    Raises:
        ValueError: its brackets do not match, or it holds a comment or a semicolon.
    """
    tokens = [match.group() for match in _TOKEN.finditer(filter_text)]
    depth = 0
    for position, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        pair = token + "".join(tokens[position + 1 : position + 2])
        if depth < 0:
            break
        if token == ";" or pair in ("--", "/*"):
            raise ValueError(
                f"filter {filter_text!r}: one expression is wanted, without comments or semicolons"
            )
    if depth:
        raise ValueError(f"filter {filter_text!r}: its brackets do not match")
    return f"({filter_text})"


def expand_filter(filter_text: str, schema: pa.Schema) -> str:
    """`filter_text` in the SQL that Lance takes, in brackets, so that nothing behind it is ignored.

    The names `accepted` and `reject_reason`, bare or backquoted, become the effective verdicts, and
    ``scores['contrast']`` (of any map column) becomes the value of that key. Text inside string literals and
    fields after a dot are left alone.
    """
    filter_text = whole_filter(filter_text)
    expressions = effective_expressions(schema)
    maps = {field.name for field in schema if pa.types.is_map(field.type)}
    tokens = [match.group() for match in _TOKEN.finditer(filter_text)]
    out: list[str] = []
    position = 0
    while position < len(tokens):
        token, rest = tokens[position], tokens[position + 1 : position + 4]
        name = token.strip("`")
        is_key = len(rest) == 3 and (rest[0], rest[2]) == ("[", "]") and rest[1].startswith("'")
        if name in maps and is_key:
            out.append(f"map_extract({name}, {rest[1]})[1]")
            position += 4
            continue
        follows_dot = bool(out) and out[-1] == "."
        out.append(expressions[name] if name in expressions and not follows_dot else token)
        position += 1
    return "".join(out)
