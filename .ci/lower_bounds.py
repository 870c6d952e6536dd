"""Print constraints for pip: what setup.cfg states as lowest versions, as the only ones.

    python .ci/lower_bounds.py test > oldest.txt && pip install -c oldest.txt -e ".[test]"

PyTorch is left at its newest: old releases are large, and not built for a CPU alone on PyPI.
"""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

LOWEST = re.compile(r"([\w.-]+)>=([\d.]+)")

setup = ConfigParser(interpolation=None)
setup.read(Path(__file__).parents[1] / "setup.cfg")
lines = setup["options"]["install_requires"].splitlines()
for extra in sys.argv[1:]:
    lines += setup["options.extras_require"][extra].splitlines()
stated = dict(found.groups() for line in lines if (found := LOWEST.fullmatch(line)))
stated.pop("torch")
print(*(f"{name}=={version}" for name, version in sorted(stated.items())), sep="\n")
