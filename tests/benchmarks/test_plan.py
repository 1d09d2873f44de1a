"""What benchmarks/run.py plans to measure, and what it refuses before it starts."""

import pytest
import torch

from benchmarks import run
from benchmarks.peers import PEERS
from tests.nlu.tiny import write_rows

USUAL = [key for key, peer in PEERS.items() if not (peer.compiled or peer.package)]
ON_NUMBERS = [key for key in USUAL if key != "published"]


@pytest.fixture(autouse=True)
def no_glue_dir(monkeypatch):
    monkeypatch.delenv("GLUE_DIR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def glue(tmp_path):
    """MRPC of pairs of 4 to 40 words, in an order that padding suffers from."""
    texts = ["w " * (2 + (7 * i) % 19) for i in range(96)]
    rows = [{"sentence1": text, "sentence2": text, "label": i % 2, "idx": i} for i, text in enumerate(texts)]
    write_rows(tmp_path / "mrpc/train.jsonl", rows)
    return str(tmp_path)


def _plan(*arguments):
    return run.plan(run.parse(list(arguments)))


def _cells(settings):
    """(precision, layers, batches) of every peer: one, where they are equal."""
    return [{(s.precision, s.layers, s.batches) for s in shapes.values()} for _, shapes in settings]


def test_the_usual_settings():
    settings = _plan()
    expected = [(p, n) for p in ("float32", "bfloat16") for n in (64, 128, 256)]
    assert _cells(settings) == [{(p, 12, ((32, n),))} for p, n in expected]
    assert [name for name, _ in settings] == [f"{p}, 12 layers, batch 32, length {n}" for p, n in expected]
    for name, shapes in settings:
        without = [] if name.startswith("bfloat16") else ["peft-lora-bf16"]
        assert list(shapes) == [key for key in ON_NUMBERS if key not in without]
        assert {s.vocabulary for s in shapes.values()} == {128_100} and {s.device for s in shapes.values()} == {"cpu"}


def test_a_peer_has_the_cores_that_the_benchmark_may_use(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert run.parse([]).threads == 1


def test_quick_is_two_layers_at_length_64():
    settings = _plan("--quick")
    assert _cells(settings) == [{(p, 2, ((32, 64),))} for p in ("float32", "bfloat16")]
    assert list(settings[1][1]) == ON_NUMBERS and run.parse(["--quick"]).rounds == 3
    assert {s.vocabulary for _, shapes in settings for s in shapes.values()} == {8_000}


def test_real_lengths_are_in_buckets_for_the_peers_here_only(glue):
    arguments = ["--peers", "peft-lora,lora2,published", "--precisions", "bfloat16", "--layers", "3", "--batch", "8"]
    ((name, shapes),) = _plan("--lengths", "mrpc", "--glue_dir", glue, *arguments)
    assert name == "bfloat16, 3 layers, batch 8, mrpc" and list(shapes) == ["peft-lora", "lora2", "published"]
    assert {s.layers for s in shapes.values()} == {3}
    assert shapes["peft-lora"].precision == shapes["lora2"].precision == "bfloat16"
    tokens = {key: sum(rows * n for rows, n in shapes[key].batches) for key in ("peft-lora", "lora2")}
    assert len(shapes["lora2"].batches) == 6 and tokens["lora2"] < 0.9 * tokens["peft-lora"]


def test_the_published_peer_pads_to_320_in_float32_on_tasks_only(glue):
    settings = _plan("--lengths", "64,mrpc", "--glue_dir", glue, "--precisions", "bfloat16", "--batch", "8")
    (_, numbers), (_, real) = settings
    assert "published" not in numbers and list(real) == USUAL
    assert (real["published"].precision, real["published"].batches) == ("float32", ((8, 320),))


def test_names_with_a_dot_get_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    for name in ("v1.2", "v1.3"):
        assert run.parse(["--name", name]).name == name
        run.write({"name": name}, name, name)
    assert {path.name for path in tmp_path.iterdir()} == {"v1.2.json", "v1.2.md", "v1.3.json", "v1.3.md"}
    assert (tmp_path / "v1.2.md").read_text() == "v1.2"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--peers", "x"], "'x' is none of"),
        (["--peers", "lora,lora"], "lora is there twice"),
        (["--peers", "lora,flashdeberta"], "flashdeberta needs the package flashdeberta"),
        (["--lengths", "0"], "'0' is neither"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--name", "n\n"], "must be"),
        (["--device", "tpu"], "'tpu' is neither cpu nor cuda"),
        (["--device", "cuda"], "no CUDA device"),
        (["--quick", "--scaling"], "give one of them"),
        (["--quick", "--lengths", "64"], "--quick settles --lengths"),
        (["--peers", "lora2,published", "--lengths", "64"], "published is measured with --lengths mrpc or rte only"),
        (["--quick", "--peers", "published"], "published is measured with --lengths mrpc or rte only"),
        (["--peers", "lora,peft-lora-bf16", "--precisions", "float32"], "measured with --precisions bfloat16 only"),
        (["--lengths", "mrpc", "--glue_dir", "/nowhere"], "/nowhere"),
    ],
)
def test_refused_in_one_line_before_anything_is_built(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(run, "Workers", lambda *_: pytest.fail("a peer was started"))
    assert run.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
