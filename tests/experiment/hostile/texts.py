"""Hostile texts that exploit, overload or confuse parsers."""

from __future__ import annotations

from tests.experiment.hostile.corpus import (
    ANY,
    FIELD,
    SYNTAX,
    TRUST,
    Hostile,
    experiment,
    model,
    with_hook,
)


def levels(depth: int) -> str:
    """Return nested mappings in block style."""
    return "".join(f"{'  ' * level}a:\n" for level in range(depth))


def _billion_laughs() -> str:
    rows = ["a0: &a0 [lol, lol, lol]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(rows) + "\n"


YAML = [
    Hostile(
        "billion_laughs",
        "Nine to the eleventh items out of twelve lines.",
        _billion_laughs(),
        SYNTAX,
        "aliases are not read",
    ),
    Hostile(
        "alias",
        "A value that stands in two places and is changed in both.",
        experiment("accelerator: &x {}\ncheckpoint: *x\n"),
        SYNTAX,
        "aliases are not read",
    ),
    Hostile(
        "merge_key_alias",
        "A mapping that comes in through a merge key.",
        experiment("accelerator: &x {}\ncheckpoint:\n  <<: *x\n"),
        SYNTAX,
        "aliases are not read",
    ),
    Hostile(
        "merge_key_inline",
        "Fields that the merge key hides from a reader.",
        experiment("<<: {trust: [os]}\n"),
        FIELD,
        "<<: an experiment has no such field",
    ),
    Hostile(
        "tag_apply",
        "PyYAML calls a function.",
        experiment(name='!!python/object/apply:os.system ["touch pwned"]'),
        SYNTAX,
        "tags are",
    ),
    Hostile(
        "tag_new",
        "PyYAML makes an instance.",
        experiment(name='!!python/object/new:subprocess.Popen [["touch", "pwned"]]'),
        SYNTAX,
        "tags are not read",
    ),
    Hostile(
        "tag_name",
        "PyYAML imports a module.",
        experiment(name="!!python/name:os.system"),
        SYNTAX,
        "tags are not read",
    ),
    Hostile(
        "tag_module",
        "PyYAML imports a module.",
        experiment(name="!!python/module:antigravity"),
        SYNTAX,
        "tags are not read",
    ),
    Hostile(
        "tag_in_key",
        "A tag where a key stands.",
        experiment("!!python/name:os.system : 1\n"),
        SYNTAX,
        "tags",
    ),
    Hostile(
        "tag_directive",
        "A tag under another name.",
        "%TAG ! tag:yaml.org,2002:python/\n---\n" + experiment(name="!name:os.system"),
        SYNTAX,
        "tags are not read",
    ),
    Hostile(
        "tag_local",
        "An include, as other programs have them.",
        experiment(name="!include /etc/passwd"),
        SYNTAX,
        "tags are not read",
    ),
    Hostile(
        "tag_set",
        "A set, which no document holds.",
        experiment("accelerator: !!set {a, b}\n"),
        SYNTAX,
        "tags are not read",
    ),
    Hostile(
        "repeated_field",
        "One reader takes the first value, another the last.",
        experiment("name: other\n"),
        SYNTAX,
        "name: the key occurs twice",
    ),
    Hostile(
        "repeated_key",
        "The same further in.",
        model("MLP, class_type: os:system"),
        SYNTAX,
        "model.class_type: the key occurs twice",
    ),
    Hostile(
        "second_document",
        "A second document that a reader doesn't see.",
        experiment() + "---\n" + experiment(),
        SYNTAX,
        "found another document",
    ),
    Hostile(
        "deep_lists",
        "Recursion without an end.",
        experiment(name="[" * 900),
        SYNTAX,
        "nested deeper than 64 levels",
    ),
    Hostile(
        "endless_lists",
        "A parser's own recursion.",
        experiment(name="[" * 100_000),
        SYNTAX,
        "broken YAML|nested deeper than 64 levels",  # newer releases of libyaml have a limit
    ),
    Hostile(
        "deep_mappings",
        "The same of mappings.",
        experiment(name="{a: " * 30_000),
        SYNTAX,
        "nested deeper than 64 levels",
    ),
    Hostile(
        "deep_blocks", "The same in block style.", levels(250), SYNTAX, "deeper than 64 levels"
    ),
    Hostile(
        "deep_dashes",
        "The same in one line.",
        "name:\n  " + "- " * 50_000,
        SYNTAX,
        "nested deeper than 64 levels",
    ),
    Hostile(
        "one_level_too_deep",
        "One more than is read.",
        experiment(name="[" * 64 + "]" * 64),
        SYNTAX,
        "nested deeper than 64 levels",
    ),
    Hostile(
        "endless_keys", "A parser that waits for a key's end.", "? " * 50_000, SYNTAX, "key of text"
    ),
    Hostile("endless_quote", "A text without an end.", 'name: "' + "x" * 100_000, SYNTAX, "quoted"),
    Hostile(
        "endless_anchors", "Anchors upon anchors.", "name: " + "&a " * 40_000, SYNTAX, "broken YAML"
    ),
    Hostile(
        "huge_integer",
        "Digits that take quadratic time to convert.",
        experiment(seed="9" * 100_000),
        SYNTAX,
        "seed: Exceeds the limit",
    ),
    Hostile(
        "huge_hexadecimal",
        "A number that can't be written down again.",
        experiment(seed="0x" + "f" * 100_000),
        SYNTAX,
        "seed: Exceeds the limit",
    ),
    Hostile(
        "infinity",
        "A loss that is never smaller.",
        experiment(optimizer="{class_type: torch.optim:SGD, lr: .inf}"),
        SYNTAX,
        "finite number",
    ),
    Hostile(
        "not_a_number",
        "Weights that all become NaN.",
        experiment(optimizer="{class_type: torch.optim:SGD, lr: .nan}"),
        SYNTAX,
        "finite number",
    ),
    Hostile(
        "overflow",
        "Infinity, written as a number.",
        experiment(optimizer="{class_type: torch.optim:SGD, lr: 1e999}"),
        SYNTAX,
        "finite number",
    ),
    Hostile("number_as_key", "A key that is no text.", experiment("3: x\n"), SYNTAX, "key of text"),
    Hostile(
        "null_as_key", "A key that is nothing.", experiment("null: x\n"), SYNTAX, "key of text"
    ),
    Hostile(
        "list_as_key", "A key that can't be one.", experiment("[a, b]: x\n"), SYNTAX, "of text"
    ),
    Hostile("mapping_as_key", "The same.", experiment("{a: b}: x\n"), SYNTAX, "key of text"),
    Hostile(
        "tabs",
        "Indentation that looks like something else.",
        "model:\n\tclass_type: MLP\n",
        SYNTAX,
        "broken YAML",
    ),
    Hostile("cut", "A file that was cut in the middle.", experiment()[:-3], SYNTAX, "broken YAML"),
    Hostile("empty", "Nothing.", "", SYNTAX, "expected a mapping of fields at the top"),
    Hostile("only_comments", "Nothing as well.", "# name: x\n", SYNTAX, "expected a mapping of"),
    Hostile("a_list", "A list of experiments.", "- name: x\n", SYNTAX, "at the top, found list"),
    Hostile("a_text", "A text.", "train!\n", SYNTAX, "at the top, found str"),
    Hostile(
        "nul_byte",
        "A name that C reads to its middle.",
        experiment(name='"a\0b"'),
        SYNTAX,
        "#x0000",
    ),
    Hostile(
        "escape_sequence", "A terminal that obeys.", experiment(name='"\x1b[2J"'), SYNTAX, "#x001b"
    ),
    Hostile(
        "escaped_key",
        "The same in an error's place.",
        experiment('"\\e[2J\\e]0;x": 1\n'),
        FIELD,
        '"\\u001b[2J\\u001b]0;x": an experiment has no such field',
    ),
    Hostile(
        "latin_1",
        "Bytes that are no UTF-8.",
        experiment(name="é").encode("latin-1"),
        SYNTAX,
        "expected UTF-8",
    ),
    Hostile(
        "utf_16",
        "Another encoding, with its mark.",
        experiment().encode("utf-16"),
        SYNTAX,
        "expected UTF-8",
    ),
    Hostile("utf_32", "And another one.", experiment().encode("utf-32"), SYNTAX, "expected UTF-8"),
    Hostile(
        "half_a_surrogate",
        "Text that can't be written down again.",
        experiment(name='"\\ud800"'),
        SYNTAX,
        "broken YAML",
    ),
    Hostile(
        "overlong",
        "A dot that is written so that no check sees it.",
        experiment().encode() + b"run_folder: \xc0\xae\xc0\xae/x\n",
        SYNTAX,
        "expected UTF-8",
    ),
    Hostile(
        "too_large",
        "Data in the place of a description.",
        experiment(f"# {'x' * 300_000}\n"),
        SYNTAX,
        "exceeds the limit of 131072 bytes",
    ),
    Hostile(
        "too_many_values",
        "Too much to look at.",
        with_hook(f"{{class_type: EMA, a: [{'0,' * 25_000}]}}"),
        SYNTAX,
        "more than 20000 values",
    ),
    Hostile(
        "long_key",
        "A place that fills the screen.",
        experiment(f"{'k' * 900}: 1\n"),
        SYNTAX,
        "keys of at most 200 characters",
    ),
    Hostile(
        "other_version",
        "Rules of a YAML that isn't ours.",
        "%YAML 9.9\n---\n" + experiment(),
        SYNTAX,
        "broken YAML",
    ),
    Hostile(
        "a_pickle",
        "A checkpoint that is called a file.",
        b"\x80\x04\x95\x1a\x00\x00\x00.",
        SYNTAX,
        "expected UTF-8",
    ),
]

JSON_AND_TOML = [
    Hostile("json_nan", "What is no number in no JSON.", '{"seed": NaN}', SYNTAX, "finite", "json"),
    Hostile("json_infinity", "The same.", '{"seed": -Infinity}', SYNTAX, "finite number", "json"),
    Hostile("json_overflow", "The same as a number.", '{"seed": 1e999}', SYNTAX, "finite", "json"),
    Hostile(
        "json_huge_integer",
        "Digits that take quadratic time.",
        f'{{"seed": {"9" * 100_000}}}',
        SYNTAX,
        "Exceeds the limit",
        "json",
    ),
    Hostile(
        "json_repeated",
        "One reader takes the first, another the last.",
        '{"model": {"class_type": "MLP", "class_type": "os:system"}}',
        SYNTAX,
        "model.class_type: the key occurs twice",
        "json",
    ),
    Hostile(
        "json_deep",
        "Recursion without an end.",
        '{"a":' * 20_000,
        SYNTAX,
        "nested deeper than 64 levels",
        "json",
    ),
    Hostile(
        "json_deep_lists",
        "The same.",
        '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
        SYNTAX,
        "nested deeper than 64 levels",
        "json",
    ),
    Hostile(
        "json_surrogate",
        "Text that can't be written.",
        '{"name": "\\ud800"}',
        SYNTAX,
        "name: text can't hold the lone surrogate",
        "json",
    ),
    Hostile("json_cut", "A file that was cut.", '{"name": "x', SYNTAX, "broken JSON", "json"),
    Hostile(
        "json_comment",
        "What only looks like JSON.",
        '{"name": "x"} // {',
        SYNTAX,
        "broken JSON",
        "json",
    ),
    Hostile("json_list", "A list.", "[1]", SYNTAX, "at the top, found list", "json"),
    Hostile("json_bom", "A byte order mark.", b'\xef\xbb\xbf{"name": "x"}', SYNTAX, "BOM", "json"),
    Hostile(
        "json_reference",
        "A shell.",
        '{"model": {"class_type": "os:system"}, "data": {}, "batch_processor": {}, "trainer": {}}',
        TRUST,
        "model.class_type: 'os:system'",
        "json",
    ),
    Hostile(
        "toml_repeated",
        "One reader takes the first, another the last.",
        '[model]\nclass_type = "MLP"\nclass_type = "os:system"\n',
        SYNTAX,
        "Cannot overwrite",
        "toml",
    ),
    Hostile(
        "toml_table_twice",
        "The same of a table.",
        "[model]\na = 1\n[model]\nb = 2\n",
        SYNTAX,
        "broken TOML",
        "toml",
    ),
    Hostile(
        "toml_deep",
        "Recursion without an end.",
        "a = " + "[" * 100_000,
        SYNTAX,
        "nested deeper than 64 levels",
        "toml",
    ),
    Hostile(
        "toml_dotted",
        "Memory by the square of a key's length.",
        "a." * 50_000 + "b = 1\n",
        SYNTAX,
        "nested deeper than 64 levels",
        "toml",
    ),
    Hostile(
        "toml_behind_quotes",
        "The same, behind a text that ends in a quote of its own.",
        f'x = {{a = """b"""", {"a." * 50_000}b = "1"}}\n',
        SYNTAX,
        "nested deeper than 64 levels",
        "toml",
    ),
    Hostile(
        "toml_quotes",
        "Time by the square of the number of quotes.",
        "x = " + '\\"' * 60_000,
        SYNTAX,
        "broken TOML",
        "toml",
    ),
    Hostile(
        "toml_long_quotes",
        "The same of texts of several lines.",
        '\\"""x\n' * 20_000 + "\\",
        SYNTAX,
        "broken TOML",
        "toml",
    ),
    Hostile(
        "toml_header",
        "The same in a header.",
        f"[{'a.' * 50_000}b]\n",
        SYNTAX,
        "nested deeper than 64 levels",
        "toml",
    ),
    Hostile(
        "toml_huge_integer",
        "Digits that take quadratic time.",
        f"seed = {'9' * 100_000}\n",
        SYNTAX,
        "broken TOML",
        "toml",
    ),
    Hostile(
        "toml_infinity", "A loss that is never smaller.", "seed = inf\n", SYNTAX, "finite", "toml"
    ),
    Hostile("toml_cut", "A file that was cut.", 'name = "x', SYNTAX, "broken TOML", "toml"),
    Hostile(
        "toml_many_tables",
        "A parser that is slow with many tables.",
        "".join(f"[a{n}.b]\n" for n in range(11_000)),
        SYNTAX,
        "more than 20000",
        "toml",
    ),
    Hostile(
        "toml_reference",
        "A shell.",
        '[model]\nclass_type = "os:system"\n[data]\n[batch_processor]\n[trainer]\n',
        TRUST,
        "model.class_type: 'os:system'",
        "toml",
    ),
    Hostile("python_suffix", "A program.", "import os\n", ANY, "a file name that ends in", "py"),
    Hostile("pickle_suffix", "A pickle.", b"cos\nsystem\n", ANY, "a file name that ends in", "pkl"),
]
