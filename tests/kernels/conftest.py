"""The library of operators, built once for all tests."""

import shutil

import pytest

from qcompiler.kernels.build import build
from qcompiler.kernels.library import FILE_NAME


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    return build(tmp_path_factory.mktemp("operators") / FILE_NAME)
