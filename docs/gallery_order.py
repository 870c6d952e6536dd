"""The order of the gallery, a course from one pipeline to several machines, and its resets."""

from skspin import open_store

LESSONS = (
    "plot_quickstart.py",
    "plot_sparsity_search.py",
    "plot_sites_by_layer.py",
    "plot_instruct.py",
    "plot_text_and_numbers.py",
    "plot_multilabel.py",
    "plot_explain.py",
    "plot_growing_text.py",
    "plot_prune.py",
    "plot_dask_cluster.py",
    "plot_gpu.py",
    "spin_protocol.py",
)


def by_lesson(filename: str) -> int:
    """Give a script's place; a ValueError names one that has none yet."""
    return LESSONS.index(filename)


def empty_store(gallery_conf, script: str) -> None:
    """Let every script find what it finds when it is run by itself: no activations kept."""
    open_store().clear()
