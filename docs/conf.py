"""How the documentation is built; `make docs` does it, and fails on any warning."""

import sys
import tempfile
import zlib
from pathlib import Path

from sphinx.ext.napoleon.docstring import GoogleDocstring

import isolated_tasks

HERE = Path(__file__).parent

project = "isolated_tasks"
author = "The isolated_tasks authors"
copyright = author
version = release = isolated_tasks.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["extensions", "inventories"]
# A link that leads nowhere is an error, also one of a docstring's.
nitpicky = True
# What docstrings write in single backticks may be a name that is not public, so it is no link.
default_role = "literal"
nitpick_ignore = [
    # Its documentation has no inventory.
    ("py:class", "prometheus_client.registry.CollectorRegistry"),
    # Celery has no types, so the package imports these for annotations alone, and Sphinx does not.
    ("py:class", "Celery"),
    ("py:class", "Task"),
]

html_theme = "furo"
html_title = f"isolated_tasks {version}"
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# It takes what stands before a colon in an attribute's comment for a type, and here it never is.
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end  # type: ignore[method-assign]
# As annotations have them.
autodoc_type_aliases = {
    "Mapping": "collections.abc.Mapping",
    "Sequence": "collections.abc.Sequence",
}


# ── other projects ──────────────────────────────────────────────────────────────────────────────


def _inventory(name: str) -> str:
    """The file that intersphinx reads for inventories/<name>.txt.

    Their real inventories are on the network, which a build has no need of: these hold the names
    that the pages refer to, so that one which is missing is a warning, and `make docs-links` asks
    whether the addresses are right.
    """
    body = (HERE / "inventories" / f"{name}.txt").read_bytes()
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n".encode()
    head += b"# The remainder of this file is compressed using zlib.\n"
    path = Path(tempfile.mkdtemp(prefix="docs-inventory-"), f"{name}.inv")
    path.write_bytes(head + zlib.compress(body))
    return str(path)


intersphinx_mapping = {
    "python": ("https://docs.python.org/3", (_inventory("python"),)),
    "celery": ("https://docs.celeryq.dev/en/stable", (_inventory("celery"),)),
}

# `make docs-links`: addresses that are only examples.
linkcheck_ignore = [r"http://localhost.*", r"http://127\.0\.0\.1.*"]

sys.path.insert(0, str(HERE / "extensions"))
