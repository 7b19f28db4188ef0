"""The table from which `fuse` reads how a conditioner runs."""

import json

import pytest
import torch

from benchmarks import choices as command
from hybridflow.kernels.swap import _choices
from hybridflow.kernels.swap._choices import Layer, device_key, fewest_samples, prefers_one_op

SMALL = Layer("conv", 2, 8, 4, 3, 4, 4)
LARGE = Layer("conv", 32, 512, 64, 3, 16, 16)
DENSE = Layer("dense", 1, 64, 2)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table for CPUs and one kind of GPU, instead of the committed one."""
    path = tmp_path / "choices.json"
    cpu = (SMALL, 8), (LARGE, None), (DENSE, 1)
    sections = {"cpu": cpu, "sm_90 float32": ((SMALL, 300),)}
    path.write_text(
        json.dumps(
            {
                key: {"rows": [layer._asdict() | {"fewest": fewest} for layer, fewest in rows]}
                for key, rows in sections.items()
            }
        )
    )
    monkeypatch.setattr(_choices, "PATH", path)
    forget()
    yield path
    forget()


def forget():
    fewest_samples.cache_clear()
    _choices._sections.cache_clear()


def test_a_measured_layer_has_its_own_answer_and_any_other_that_of_the_most_alike(table):
    assert fewest_samples(SMALL, "cpu") == 8 and fewest_samples(LARGE, "cpu") is None
    assert fewest_samples(SMALL, "sm_90 float32") == 300
    assert fewest_samples(SMALL._replace(hidden=16, inputs=3), "cpu") == 8
    assert fewest_samples(LARGE._replace(hidden=128, height=8), "cpu") is None
    assert fewest_samples(Layer("dense", 30, 500, 60), "cpu") == 1


def test_where_nothing_was_measured_layers_run_as_they_are(table):
    assert fewest_samples(SMALL, "sm_90 bfloat16") is None
    assert fewest_samples(DENSE, "sm_90 float32") is None
    table.unlink()
    forget()
    assert fewest_samples(SMALL, "cpu") is None


def test_the_number_of_samples_decides_unless_a_choice_is_forced(table):
    cpu = device_key(torch.device("cpu"), torch.float32)
    assert cpu == "cpu"
    assert not prefers_one_op(SMALL, 7, cpu) and prefers_one_op(SMALL, 8, cpu)
    assert not prefers_one_op(LARGE, 10**6, cpu)
    with _choices.using(True):
        assert prefers_one_op(LARGE, 1, cpu)
        with _choices.using(False):
            assert not prefers_one_op(SMALL, 8, cpu)
    assert not prefers_one_op(SMALL, 7, cpu)


def test_the_committed_table_says_what_was_measured():
    sections = json.loads(_choices.PATH.read_text())
    assert "cpu" in sections
    for section in sections.values():
        assert section["command"][:3] == ["python", "-m", "benchmarks.choices"]
        rows = section["rows"]
        assert [tuple(row[f] for f in Layer._fields) for row in rows] == [*command.LAYERS]
        for row in rows:
            assert row["fewest"] == command.fewest({int(b): r for b, r in row["faster"].items()})


def test_a_choice_needs_every_larger_batch_to_be_no_slower():
    assert command.fewest({1: 2.0, 4: 0.9, 16: 1.0, 64: 3.0}) == 16
    assert command.fewest({1: 2.0, 4: 0.9}) is None
    assert command.fewest({1: 1.0, 4: 1.5}) == 1


def test_the_command_rewrites_its_section_alone(tmp_path, monkeypatch, capsys):
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"sm_90 float32": "as it was", "cpu": "old"}))
    monkeypatch.setattr(command, "LAYERS", (SMALL,))
    assert command.main(["--batches", "1", "3", "--seconds", "0.001", "--out", str(path)]) == 0
    sections = json.loads(path.read_text())
    assert sections["sm_90 float32"] == "as it was"
    (row,) = sections["cpu"]["rows"]
    assert Layer(*(row[f] for f in Layer._fields)) == SMALL
    assert {*row["faster"]} == {"1", "3"} and all(r > 0 for r in row["faster"].values())


@pytest.mark.parametrize("products", (torch.float32, torch.bfloat16))
def test_narrow_products_are_measured_under_autocast(monkeypatch, products):
    taken = []
    run = command._run

    def watched(step, x, *others):
        step.coupling.conditioner[0].register_forward_hook(lambda *a: taken.append(a[2].dtype))
        run(step, x, *others)

    monkeypatch.setattr(command, "_run", watched)
    row = command.measure(LARGE._replace(height=2, width=2), torch.device("cpu"), products, (1,), 0)
    assert {*taken} == {products} and row["faster"][1] > 0


def test_the_command_refuses_types_that_have_no_op(tmp_path, capsys):
    path = tmp_path / "choices.json"
    with pytest.raises(SystemExit):
        command.main(["--type", "bfloat16", "--out", str(path)])
    assert "--type: got bfloat16, want float32" in capsys.readouterr().err
    assert not path.exists()
