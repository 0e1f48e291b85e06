"""Settings of the documentation: `make docs` builds it, offline, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "_extensions")]

project = "llmq"
author = "the llmq authors"
copyright = "the llmq authors, Apache-2.0"  # noqa: A001  (Sphinx's name)
html_title = "llmq"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "from_code",
]
exclude_patterns = ["_extensions", "_static"]

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # single backticks in docstrings
smartquotes = False  # would turn --options into dashes

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature's defaults and the docstring's words say it shorter
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_preprocess_types = False

copybutton_exclude = ".linenos, .gp, .go"
pygments_style = "friendly"
pygments_dark_style = "monokai"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["llmq.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b5f8a",
        "color-brand-content": "#0b5f8a",
        "color-brand-visited": "#0b5f8a",
    },
    "dark_css_variables": {
        "color-brand-primary": "#6cc1f0",
        "color-brand-content": "#6cc1f0",
        "color-brand-visited": "#6cc1f0",
    },
    "navigation_with_keys": True,
}
