"""`streaming` without what text does not need: it works, and whoever wants the rest gets it."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "torchvision", "pandas", "pyarrow", "scipy", "streaming.text", "streaming.vision")


def output_of(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_nothing_heavy_is_imported_and_all_of_it_can_be() -> None:
    program = f"""
import sys
import data.rows
print([name for name in {HEAVY} if name in sys.modules])
import streaming, streaming.text, transformers
print(streaming.text.__file__ is not None, isinstance(transformers.PretrainedConfig, type))
print(data.rows.RowDataset.__mro__[1])
"""
    assert output_of(program) == "[]\nTrue True\n<class 'streaming.base.dataset.StreamingDataset'>\n"


def test_what_is_there_already_is_left_alone() -> None:
    program = """
import sys
import pandas, types
sys.modules["transformers"] = theirs = types.ModuleType("transformers")
from data.light_streaming import import_streaming
import_streaming()
print(sys.modules["transformers"] is theirs, "streaming" in sys.modules)
"""
    assert output_of(program) == "True True\n"


@pytest.mark.slow
def test_a_version_that_needs_them_is_imported_as_a_whole(tmp_path) -> None:
    errors = ["AttributeError", "ImportError"]
    for error in errors:
        (tmp_path / error / "transformers").mkdir(parents=True)
        (tmp_path / error / "transformers" / "__init__.py").write_text("REAL = 1")
        (tmp_path / error / "streaming").mkdir()
        (tmp_path / error / "streaming" / "__init__.py").write_text(
            f"import transformers\nif not hasattr(transformers, '__file__'): raise {error}\nprint(transformers.REAL)"
        )
    program = f"""
import sys
from data.light_streaming import import_streaming
for error in {errors}:
    sys.path.insert(0, f"{tmp_path}/{{error}}")
    import_streaming()
    streaming, transformers = (sys.modules.pop(name) for name in ("streaming", "transformers"))
    print(error in streaming.__file__, error in transformers.__file__, transformers.REAL)
"""
    assert output_of(program) == "1\nTrue True 1\n" * 2
