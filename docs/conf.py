"""How Sphinx builds these pages: ``sphinx-build -W --keep-going docs docs/_build/html``.

Building needs no network, no GPU and no model beside the one in the ``docs`` extra.
"""

import os
import sys
from html import escape

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DELAY"] = "inf"  # a page would show every step of a bar's way

import skspin

sys.path.insert(0, os.path.dirname(__file__))  # so that sphinx-gallery finds `gallery_order`

project = "skspin"
author = "the skspin developers"
copyright = f"2026, {author}"
version = release = skspin.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.extlinks",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
    "sphinx_design",
    "myst_parser",  # for CHANGELOG.md
]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
# Scripts that the gallery makes pages of, and tables that a page includes, are no pages themselves.
exclude_patterns = ["_build", "examples", "benchmarks"]
templates_path = ["_templates"]
default_role = "code"
nitpicky = True  # a name that leads nowhere is a warning
smartquotes = False  # a "salience" copied from a page has to be one that Python reads
toc_object_entries_show_parents = "hide"
add_function_parentheses = False
extlinks = {"arxiv": ("https://arxiv.org/abs/%s", "arXiv:%s")}

# API pages ----------------------------------------------------------------------------------------

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say types, with shapes
numpydoc_show_class_members = False  # the class template lists them
numpydoc_validation_checks = {"all", "ES01", "EX01", "GL01", "SA01", "SA04", "RT02"}
numpydoc_validation_exclude = {r"\.set_\w+_request$", r"\.TRUSTED_TYPES$"}

# Gallery ------------------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"[\\/]plot_",  # the other scripts are shown and not run
    "within_subsection_order": "gallery_order.by_lesson",
    "reset_modules": ("matplotlib", "gallery_order.empty_store"),
    "backreferences_dir": "api/generated/backreferences",
    "doc_module": ("skspin",),
    "abort_on_example_error": True,
    "show_memory": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "plot_gallery": True,
}

# Looks --------------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "skspin"
html_static_path = ["_static"]
html_css_files = ["skspin.css"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "skspin"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button"],
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
# An empty "Section Navigation" says nothing.
_PAGES_ALONE = (
    *("index", "install", "api", "benchmarks", "development", "changelog", "cite"),
    *("design/probes", "genindex", "search"),
)
html_sidebars = {name: [] for name in _PAGES_ALONE}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Links to scikit-learn, which its inherited docstrings have many of -------------------------------

_SKLEARN = "https://scikit-learn.org/stable/"
_SKLEARN_LABELS = {
    "df_output_transform": "auto_examples/miscellaneous/plot_set_output.html",
    "meta-estimator": "glossary.html#term-meta-estimator",
    "metadata_routing": "metadata_routing.html",
    "sphx_glr_auto_examples_miscellaneous_plot_set_output.py": (
        "auto_examples/miscellaneous/plot_set_output.html"
    ),
}


def link_to_sklearn(app, env, node, contnode):
    """Link without an inventory: its addresses follow from the names, and builds stay offline."""
    target = node["reftarget"].lstrip("~")
    if target in _SKLEARN_LABELS:
        address = _SKLEARN_LABELS[target]
    elif target.startswith("sklearn."):
        address = f"modules/generated/{target}.html"
    else:
        return None
    return nodes.reference("", "", contnode, refuri=_SKLEARN + address, internal=False)


# Formulas -----------------------------------------------------------------------------------------
# MathML, which browsers draw by themselves: no script from elsewhere, and the same offline.


def write_math(translator, node):
    """Write a formula within a line."""
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def write_displayed_math(translator, node):
    """Write a formula that stands alone."""
    label = escape(node.get("label") or "")
    opening = f'<div class="formula" id="{label}">' if label else '<div class="formula">'
    translator.body.append(opening)
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    translator.body.append("</div>")
    raise nodes.SkipNode


def setup(app):
    """Connect the two functions above."""
    app.connect("missing-reference", link_to_sklearn)
    app.add_html_math_renderer("mathml", (write_math, None), (write_displayed_math, None))


html_math_renderer = "mathml"
