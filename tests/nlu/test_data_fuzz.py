"""Files that were damaged at random end in rows or in one line of error, never in anything else."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nlu.data.glue import load_split
from nlu.data.own_files import load_own_files
from nlu.errors import UsageError
from nlu.tasks import TASKS
from tests.nlu.glue_samples import sample_rows, write_official
from tests.nlu.tiny import write_rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ROW = st.fixed_dictionaries(
    {}, optional={"sentence": st.text(max_size=6) | JSON, "label": st.integers(-2, 3) | JSON, "idx": JSON, "text": JSON}
)
FAST = {
    "max_examples": 80,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
}
TOKENS = [b"\t", b"\n", b"\r", b'"', b",", b"{", b"[", b"NaN", b"1e999", b"\\ud800", b"\x00"]
pytestmark = pytest.mark.slow
FORMS = {"cola": "train.jsonl", "stsb": "train.csv", "mnli": "train.tsv", "rte": "train.parquet", "qqp": "train.json"}


def rows_or_one_line(load) -> None:
    try:
        for columns in load():
            assert len({*map(len, columns.values())} - {0}) == 1
    except UsageError as error:
        assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("name", FORMS)
def test_damaged_bytes(tmp_path, name):
    task, path = TASKS[name], tmp_path / name / FORMS[name]
    rows = sample_rows(task, "train", 6)
    if path.suffix == ".tsv":
        write_official(path, task, "train", rows)
    else:
        write_rows(path, rows)
    good = path.read_bytes()
    edits = st.tuples(st.integers(0, len(good)), st.integers(0, 4), st.binary(max_size=3) | st.sampled_from(TOKENS))

    @given(st.lists(edits, min_size=1, max_size=4), st.none() | st.integers(0, len(good)))
    @settings(**FAST)
    def check(changes, end):
        content = good[:end]
        for start, removed, added in changes:
            content = content[:start] + added + content[start + removed :]
        path.write_bytes(content)
        rows_or_one_line(lambda: [load_split(task, "train", tmp_path)])

    check()


@given(st.lists(ROW, max_size=4))
@settings(**FAST)
def test_json_rows_of_any_shape(tmp_path, rows):
    path = tmp_path / "cola" / "train.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows_or_one_line(lambda: [load_split(TASKS["cola"], "train", tmp_path)])
    rows_or_one_line(lambda: load_own_files({"train": path, "validation": path, "test": path})[1].values())
