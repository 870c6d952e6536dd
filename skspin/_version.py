"""The version, stated nowhere else."""

__version__ = "0.1.0.dev0"
