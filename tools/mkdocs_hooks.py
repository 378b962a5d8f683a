"""What mkdocs.yml needs beside its plugins; ``make docs`` runs it.

- The files of `OUTSIDE` are pages of the site, too, and links between them and docs/ work in a
  checkout and in the site.
- An API page for every public package, from its docstrings.
- Blocks of ```` ```math ```` become MathML, which browsers show without a script.
"""

import ast
import os
import posixpath
import re
from glob import glob
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Files of the repository outside docs/, and the pages that they are
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "csrc/README.md": "csrc.md",
    "LICENSE": "LICENSE",
}
# Files that pages link to; the site has them as they are
COPIED = ("configs/**/*.yaml", "tools/*.py")
API = [
    *("ops", "layers", "modeling.backbone", "modeling.meta_arch", "modeling.roi_heads"),
    *("modeling.sem_seg", "solver", "data", "evaluation", "engine", "checkpoint", "export"),
    *("model_zoo", "analysis", "visualization"),
]
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_MATH = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """The API pages at the end of the navigation."""
    config.nav.append({"API": [{f"d2_deform.{name}": f"api/{name}.md"} for name in packages()]})
    return config


def packages() -> list[str]:
    """Those of `API` that are there."""
    return [name for name in API if os.path.isdir(_folder(name))]


def _folder(package: str) -> str:
    return os.path.join(ROOT, "d2_deform", *package.split("."))


def on_files(files: Files, config: Any) -> Files:
    """Adds what does not lie in docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=os.path.join(ROOT, path)))
    for pattern in COPIED:
        for path in glob(pattern, root_dir=ROOT, recursive=True):
            files.append(File.generated(config, path, abs_src_path=os.path.join(ROOT, path)))
    for name in packages():
        text = "\n\n".join([f"# d2_deform.{name}", *_directives(name)]) + "\n"
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def _directives(package: str) -> list[str]:
    """The package's own docstring, then that of everything in its ``__all__``.

    Each is asked for where it is defined: a function and its file may share a name, as
    ``ops.deform_conv2d`` does.
    """
    with open(os.path.join(_folder(package), "__init__.py")) as file:
        tree = ast.parse(file.read())
    here = f"d2_deform.{package}"
    origins: dict[str, str] = {}
    public: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in (here * node.level, node.module) if part)
            origins |= {name.asname or name.name: f"{module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = ast.literal_eval(node.value)
    own = f"::: {here}\n    options: {{members: false, show_root_heading: false}}"
    return [own, *(f"::: {origins.get(name, f'{here}.{name}')}" for name in public)]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = {page: path for path, page in OUTSIDE.items()}.get(page.file.src_uri)
    here = source or f"docs/{page.file.src_uri}"

    def relink(match: re.Match) -> str:
        before, target, after = match.groups()
        if ":" in target or target.startswith("/"):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        uri = OUTSIDE.get(path, path.removeprefix("docs/"))
        start = posixpath.dirname(page.file.src_uri) or "."
        return before + posixpath.relpath(uri, start) + after

    def draw(match: re.Match) -> str:
        return f"<p>{convert(match.group(1).strip(), display='block')}</p>"

    return _MATH.sub(draw, _LINK.sub(relink, markdown))
