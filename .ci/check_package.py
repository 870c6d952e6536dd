"""Check that the wheel and the sdist hold what they should, and no more."""

import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

OF_THE_BUILD = ("PKG-INFO", "setup.cfg", "skspin.egg-info/*", "MANIFEST.in")


def tracked(*patterns):
    """List files under version control; of those, the package is made."""
    listed = subprocess.run(["git", "ls-files", *patterns], capture_output=True, check=True)
    return set(listed.stdout.decode().split())


def wheel_files(path):
    """List a wheel's files, without the metadata that every wheel has."""
    with zipfile.ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def sdist_files(path):
    """List an sdist's files, without those that the build adds."""
    with tarfile.open(path) as sdist:
        names = {m.name.partition("/")[2] for m in sdist.getmembers() if m.isfile()}
    return {name for name in names if not any(fnmatch(name, part) for part in OF_THE_BUILD)}


def complain(path, held, wanted):
    """Say what is missing and what is too much."""
    for name in sorted(wanted - held):
        print(f"{path.name} lacks {name}")
    for name in sorted(held - wanted):
        print(f"{path.name} should not hold {name}")
    return held != wanted


dist = Path(sys.argv[1])
(wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
package = tracked("skspin")
sources = package | tracked("tests", "docs")
sources |= {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"}
wrong = [
    complain(wheel, wheel_files(wheel), package),
    complain(sdist, sdist_files(sdist), sources),
]
if not any(wrong):
    print(f"{wheel.name}: {len(package)} files; {sdist.name}: {len(sources)} files; as they should")
sys.exit(any(wrong))
