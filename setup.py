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


# For gcm.pxi; 1.3, the first that tests itself, or later.
ipsec_mb_header = Path("/usr/include/intel-ipsec-mb.h")
ipsec_mb = (
    platform.machine() == "x86_64" and ipsec_mb_header.exists() and "IMB_FEATURE_SELF_TEST_PASS" in ipsec_mb_header.read_text("utf-8")
)


def extension(name: str, source: str, *options: str) -> Extension:
    return Extension(
        name,
        [source],
        libraries=["ssl", "crypto", *(["IPSec_MB"] if ipsec_mb else [])],
        define_macros=[("L4_IPSEC_MB", "1")] if ipsec_mb else [],
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
