"""Builds the one extension, ``l4mesh._fastpath``.

``L4MESH_BUILD`` picks the mode: ``release`` (default), ``debug`` (``L4_BUG`` aborts), ``asan`` (address and
undefined-behaviour sanitizers), ``gcov`` (line counts without the GIL). ``L4MESH_DEV=1`` also builds the test-only
probe that lets the native tests call the leaves function by function, and the fuzzer; they are never in a wheel.
"""

import os
import platform
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

MODES: dict[str, dict[str, list[str]]] = {
    "release": {"compile": ["-O2", "-g"], "link": []},
    "debug": {"compile": ["-O1", "-g", "-DL4MESH_DEBUG"], "link": []},
    "asan": {
        "compile": ["-O1", "-g", "-DL4MESH_DEBUG", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"],
        "link": ["-fsanitize=address,undefined"],
    },
    "gcov": {"compile": ["-O0", "-g", "--coverage"], "link": ["--coverage"]},
}
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror=implicit-function-declaration"]

mode = os.environ.get("L4MESH_BUILD", "release")
if mode not in MODES:
    raise SystemExit(f"L4MESH_BUILD={mode}: must be one of {', '.join(MODES)}")


def has(header: str, word: str) -> bool:
    """Whether this library can be used; ``word`` is something that the first version that will do has."""
    path = Path("/usr/include") / header
    return platform.machine() == "x86_64" and path.exists() and word in path.read_text("utf-8")


# For gcm.pxi.
ipsec_mb = has("intel-ipsec-mb.h", "IMB_FEATURE_SELF_TEST_PASS")
gcrypt = has("gcrypt.h", "gcry_cipher_gettag")


def extension(name: str, source: str, *options: str) -> Extension:
    return Extension(
        name,
        [source],
        libraries=["ssl", "crypto", *(["IPSec_MB"] if ipsec_mb else []), *(["gcrypt"] if gcrypt else [])],
        define_macros=[*([("L4_IPSEC_MB", "1")] if ipsec_mb else []), *([("L4_GCRYPT", "1")] if gcrypt else [])],
        extra_compile_args=[*MODES[mode]["compile"], *WARNINGS, *options],
        extra_link_args=MODES[mode]["link"],
    )


extensions = [extension("l4mesh._fastpath", "l4mesh/_fastpath.pyx")]
if os.environ.get("L4MESH_DEV") == "1":
    extensions.append(extension("tests.native.probe", "tests/native/probe.pyx"))
    extensions.append(extension("tests.native.fuzz", "tests/native/fuzz.pyx", "-fsanitize-coverage=trace-pc"))

setup(
    ext_modules=cythonize(
        extensions,
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "binding": True,
            "embedsignature": True,
            "embedsignature.format": "python",
            "auto_pickle": False,
        },
        emit_linenums=mode != "release",
    )
)
