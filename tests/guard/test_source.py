"""Rules of the source that no tool checks: layers of the compiled part, and no way back into Python from it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "l4mesh"
LEAVES = sorted((PACKAGE / "_native").glob("*.pxd"))
PARTS = sorted((PACKAGE / "_native").glob("*.pxi"))
COMPILED = [*LEAVES, *PARTS, PACKAGE / "_fastpath.pyx"]
MARKS_OF_THE_GIL = re.compile(r"ErrOccurredWithGIL|__Pyx_WriteUnraisable|__Pyx_PyGILState_Ensure|PyGILState_Ensure")


def code_of(file: Path) -> str:
    """Without comments, strings and docstrings."""
    text = re.sub(r'""".*?"""', "", file.read_text(), flags=re.S)
    return re.sub(r"#.*", "", re.sub(r'b?"[^"\n]*"', '""', text))


@pytest.mark.parametrize("file", COMPILED, ids=lambda file: file.name)
def test_the_compiled_part_imports_nothing_of_the_python_part(file: Path) -> None:
    for module in re.findall(r"^\s*(?:from\s+(l4mesh[\w.]*)\s+c?import|c?import\s+(l4mesh[\w.]*))", file.read_text(), re.M):
        assert "".join(module).startswith("l4mesh._native"), module


def test_only_the_datapath_imports_the_extension() -> None:
    for file in PACKAGE.rglob("*.py"):
        if re.search(r"^\s*(?:from|import)\b.*_fastpath", file.read_text(), re.M):
            assert file.name == "datapath.py", file


@pytest.mark.parametrize("file", LEAVES, ids=lambda file: file.name)
def test_leaves_have_no_python_no_globals_and_say_what_they_are(file: Path) -> None:
    text, code = file.read_text(), code_of(file)
    assert re.match(r"# (Implementation, inlined into _fastpath|Declarations only|Leaves)", text)
    assert not re.search(r"\b(assert|raise|print|try|except|DEF|IF|with gil|lambda|yield)\b", code)
    for line in code.splitlines():
        assert not re.match(r"cdef (?!inline|extern|enum|struct|union)[\w *]+\b\w+\s*=", line), f"module-level variable: {line}"
        if line.startswith("cdef inline") and line.rstrip().endswith(":"):
            assert "noexcept nogil" in line, line


def test_every_function_of_the_data_path_is_noexcept_nogil() -> None:
    code = (PACKAGE / "_fastpath.pyx").read_text().split("# -- the Python face")[0]
    for signature in re.findall(r"^cdef (?!extern|enum)[^(\n]*\([^)]*\)[^:\n]*:", code, re.M):
        assert signature.endswith("noexcept nogil:"), signature


def data_path_functions(c_text: str) -> str:
    """The bodies of the C functions of the leaves and of the data path."""
    bodies = []
    for match in re.finditer(r"^static [^;{]*\b__pyx_f_\w+\([^;{]*\) \{\n.*?^\}\n", c_text, re.S | re.M):
        name = re.search(r"__pyx_f_\w+", match[0])
        assert name
        if "_native_" in name[0] or re.search(
            r"_fastpath_(conn|dial|listener|accept|worker|plan|ready|tcp|socket|ip|address_(from|to)|event|clock|clamp)",
            name[0],
        ):
            bodies.append(match[0])
    return "\n".join(bodies)


def cythonize(source: Path, c_file: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cython", "-3", "-X", "cdivision=True", "-I", str(ROOT), str(source), "-o", str(c_file)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_generated_c_of_the_data_path_never_takes_the_gil(tmp_path: Path) -> None:
    said = cythonize(PACKAGE / "_fastpath.pyx", tmp_path / "f.c")
    assert "performance hint" not in said
    functions = data_path_functions((tmp_path / "f.c").read_text())
    assert functions.count("__pyx_f_") > 100
    assert "conn_accept" in functions
    assert "half_step" in functions
    assert not MARKS_OF_THE_GIL.search(functions)


def test_the_guard_sees_a_function_that_takes_the_gil(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pyx"
    bad.write_text(
        "cdef int conn_bad(int x) nogil:\n    return x - 1\ncdef int conn_worse(int x) noexcept nogil:\n    return conn_bad(x)\ndef f(int x):\n    return conn_worse(x)\n"
    )
    cythonize(bad, tmp_path / "bad.c")
    assert MARKS_OF_THE_GIL.search((tmp_path / "bad.c").read_text())


def test_nothing_in_the_package_is_unfinished() -> None:
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "ST" + "UB", "not " + "implemented")), re.I)
    for file in PACKAGE.rglob("*.p*"):
        if file.suffix in (".py", ".pyx", ".pxd", ".pxi", ".pyi"):
            assert not words.search(file.read_text()), file
