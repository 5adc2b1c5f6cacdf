"""Images made of programs that are installed here, for machines that can pull none: Prometheus and HAProxy.

The program, the libraries it needs and a `wget` for the health check are laid over the Python base, where the published
image has them, so that docker-compose.yml is run as it stands.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.compose.engine import BASE, NAME, docker

PROMETHEUS = """
COPY bin/prometheus /bin/prometheus
RUN mkdir /prometheus && chown 65534:65534 /prometheus
USER 65534
"""
HAPROXY = """
COPY bin/haproxy /usr/local/sbin/haproxy
USER 99
CMD ["haproxy", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
"""
_WGET = """#!/usr/bin/python3 -IS
import sys, urllib.request
urllib.request.urlopen(sys.argv[-1], timeout=4)
"""


@contextmanager
def image(program: str, lines: str, variable: str) -> Iterator[dict[str, str]]:
    """Build a stand-in and give the setting that names it; without the program here, the published image is pulled."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/bin")
    if path is None:
        if subprocess.run(["docker", "compose", "pull", "--quiet", program], check=False).returncode != 0:
            pytest.skip(f"{program} is not installed here and its image cannot be pulled")
        yield {}
        return
    name = f"{NAME}:{program}"
    with tempfile.TemporaryDirectory() as folder:
        _write_context(Path(folder), program, Path(path), lines)
        docker("build", "--network=none", "--tag", name, folder)
    yield {variable: name}
    docker("image", "rm", "--force", name)


def _write_context(folder: Path, program: str, path: Path, lines: str) -> None:
    binaries, libraries = folder / "bin", folder / "lib"
    binaries.mkdir()
    libraries.mkdir()
    shutil.copy(path, binaries / program)
    for library in re.findall(r"=> (/\S+)", subprocess.check_output(["ldd", path], text=True)):
        if not Path(library).name.startswith(("libc.", "libm.", "libpthread.", "libdl.", "librt.")):
            shutil.copy(library, libraries)
    wget = binaries / "wget"
    wget.write_text(_WGET)
    wget.chmod(0o755)
    common = f"FROM {BASE}\nCOPY lib /opt/lib\nENV LD_LIBRARY_PATH=/opt/lib\nCOPY bin/wget /usr/local/bin/wget\n"
    (folder / "Dockerfile").write_text(common + lines)
