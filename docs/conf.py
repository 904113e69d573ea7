"""Sphinx's settings of the site; ``bash scripts/docs.sh`` builds it."""

from __future__ import annotations

import platform
import sys
import tomllib
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).resolve().parent  # a copy of docs/ in docs/_build
REPOSITORY = HERE.parents[2]
sys.path.insert(0, str(HERE / "_extensions"))

import inventories  # noqa: E402 - from the path above

project = "robo-orchard-hooks"
author = "the authors of robo-orchard-hooks"
version = release = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"][
    "version"
]
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "repository",
    "reference_pages",
    "python_names",
    "html_links",
]
exclude_patterns = ["tutorials"]  # the gallery has their pages
nitpicky = True
highlight_language = "none"  # of blocks that name none
smartquotes = False  # they turn --option into a dash
nitpick_ignore_regex = [
    ("py:.*", r"'.*'"),  # choices of a Literal
    ("py:class", r".*\[.*"),  # parts of a type that Sphinx has not parsed
]

# Pages in Markdown, which people also read on GitHub.
myst_heading_anchors = 4
myst_url_schemes = ("http", "https", "mailto", "repository")

# Reference of the code.
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
default_role = "py:obj"
python_display_short_literal_types = True
python_maximum_signature_line_length = 88

# The inventories are kept here, as the build has no network.
intersphinx_mapping = inventories.mapping(HERE / "_inventories", HERE.parent / "inventories")
intersphinx_disabled_reftypes = ["std:*"]

sphinx_gallery_conf = {
    "examples_dirs": ["tutorials"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"/\d+_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", "accelerate_state.reset"),
    "reset_modules_order": "both",
    "remove_config_comments": True,
    "show_signature": False,
    "write_computation_times": False,
    "nested_sections": False,
    "min_reported_time": 1e9,  # the times of one build are noise
}

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
templates_path = ["_templates"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#0b57a4", "color-brand-content": "#0b57a4"},
    "dark_css_variables": {"color-brand-primary": "#7cb8f7", "color-brand-content": "#7cb8f7"},
}
html_context = {
    "versions": {
        project: release,
        "Python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "accelerate", "sphinx")},
    }
}
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_remove_prompts = True
copybutton_exclude = ".linenos, .gp, .go"
