"""The commands, through the command line's own entry, on real digits: what they leave, print and refuse."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewbits.cli import main
from fewbits.commands import COMMANDS, load_run, run_data
from fewbits.commands.train import parse_options
from fewbits.recipes import RECIPES, make

SHORT = ["--epochs", "2", "--batch-size", "32", "--lr", "0.1", "--warmup-steps", "5", "--per-class", "60"]
SHORT += ["--no-progress", "--no-tensorboard"]


PLAIN = ["--model", "resnet20", "--data", "digits"]
FLOAT = [*PLAIN, "--recipe", "float"]


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "float"
    assert run("train", "--model", "resnet20", "--data", "digits", "--recipe", "float", "--output", folder, *SHORT) == 0
    return folder


@pytest.fixture(scope="module")
def student(teacher):
    folder = teacher.parent / "plain"
    assert run(*student_of(teacher, folder)) == 0
    return folder


def student_of(teacher: Path, folder: Path, *more: object) -> list[object]:
    bits = ["--weights", 2, "--activations", 2, "--teacher", teacher, "--output", folder]
    return ["train", "--model", "resnet20", "--data", "digits", *bits, *SHORT, *more]


def message(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_run_folder_holds_what_was_promised(student):
    run_json = json.loads((student / "run.json").read_text())
    assert run_json["plan"]["weights"] == 2
    assert run_json["model"] == "resnet20"
    assert run_json["normalisation"]["mean"]
    assert (student / "student.safetensors").stat().st_size > 0
    assert (student / "checkpoint" / "state.safetensors").exists()
    events = [json.loads(line)["event"] for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert events[-1] == "end"
    assert "evaluation" in events


def test_the_student_starts_from_its_teacher(teacher, tmp_path):
    assert run(*student_of(teacher, tmp_path / "still", "--lr", "1e-9", "--epochs", "0.1")) == 0
    still, _ = load_run(tmp_path / "still")
    taught_by, _ = load_run(teacher)
    own = still.state_dict()
    for name, parameter in taught_by.named_parameters():
        torch.testing.assert_close(own[name], parameter.detach(), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "still" / "run.json").read_text())["start"].startswith("run float")


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"float", "plain"}))
def test_every_recipe_trains_from_the_command_line(recipe, teacher, tmp_path):
    bits = ["--weights", 1, "--activations", 1] if recipe == "blockwise" else []
    rate = ["--lr", 0.01] if recipe == "dtq" else []  # the paper's; at 0.1 its alignment diverges here
    assert run(*student_of(teacher, tmp_path / recipe, "--recipe", recipe, "--epochs", "0.5", *bits, *rate)) == 0
    network, _ = load_run(tmp_path / recipe)
    assert torch.isfinite(network(torch.zeros(1, 1, 8, 8))).all()


def test_export_bench_summary_and_report(teacher, student, capsys):
    pytest.importorskip("onnxruntime")
    assert run("export", student) == 0
    exported = json.loads((student / "export.json").read_text())
    assert exported["size_bytes"] == (student / "student.onnx").stat().st_size < 120_000
    assert abs(exported["accuracy_engine"] - exported["accuracy_pytorch"]) <= 0.003  # one of 360 digits
    assert run("bench", student, "--repeats", 3, "--batch-sizes", 1, 4) == 0
    assert "student and float are the same network" not in capsys.readouterr().out
    assert {row["name"] for row in json.loads((student / "bench.json").read_text())["rows"]} == {"float", "student"}
    assert run("bench", teacher, "--repeats", 1, "--batch-sizes", 1) == 0
    printed = capsys.readouterr().out
    assert "This run is a float network: student and float are the same network" in " ".join(printed.split())
    assert "low-bit" not in printed
    assert run("summary", "--run", student) == 0
    assert run("report", teacher, student) == 0
    page = (teacher / "report.html").read_text()
    assert "plain" in page
    assert "<script src=" not in page  # self-contained
    printed = capsys.readouterr().out
    assert "layer1.0.conv1" in printed
    assert "(batch 1)" in printed


def test_bench_measures_every_exported_file_of_the_run_and_no_other(teacher, student, tmp_path, capsys):
    """Found: a file of another run, or from before training went on, was measured under the student's name."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "run"
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("*.onnx"))
    for options in (["--variant", "packed"], ["--variant", "qdq"], ["--variant", "int4"]):
        assert run("export", folder, *options, "--minimum-equal", 0.9) == 0
    quick = ["--repeats", 1, "--batch-sizes", 1, "--threads", 1, "--no-memory", "--layers", 0]
    assert run("bench", folder, *quick) == 0
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["float", "student", "student, int4", "student, qdq"]
    (folder / "bench.json").unlink()
    own = (folder / "student-int4.onnx").read_bytes()
    assert run("export", teacher, "--output", folder / "student-int4.onnx") == 0
    capsys.readouterr()
    assert run("bench", folder, *quick) == 1
    assert "student-int4.onnx is not what this student exports to: it comes from another run, or" in message(capsys)
    (folder / "student-int4.onnx").write_bytes(own)
    state = load_file(folder / "student.safetensors")
    name = next(name for name in state if name.endswith(".bias"))
    save_file(state | {name: state[name] + 1e-3}, folder / "student.safetensors")
    for command in (["bench", folder, *quick], ["parity", folder]):
        assert run(*command) == 1
        assert "or from this one before it was trained again, or is damaged; export again, or" in message(capsys)
    assert not (folder / "bench.json").exists()


def test_resume_of_a_finished_run_changes_nothing(student, teacher, capsys):
    before = {p: p.read_bytes() for p in student.glob("*.*")}
    assert run(*student_of(teacher, student, "--resume")) == 0
    assert {p: p.read_bytes() for p in before} == before
    end = json.loads((student / "metrics.jsonl").read_text().splitlines()[-1])
    said = f"accuracy {100 * end['accuracy']:.2f} %, best {100 * end['best_accuracy']:.2f} %; the run is in {student}"
    assert said in capsys.readouterr().out  # though it was asked for no progress


def test_training_without_progress_says_what_came_of_it(teacher, tmp_path, capsys):
    assert run(*student_of(teacher, tmp_path / "short", "--epochs", "0.1")) == 0
    assert capsys.readouterr().out.strip().endswith(f"%; the run is in {tmp_path / 'short'}")


def test_options_without_an_effect_are_refused(student, teacher, tmp_path, capsys):
    assert run(*student_of(teacher, tmp_path / "x", "--scratch")) == 1
    assert "scratch has no effect: the student starts from its teacher, run float (resnet20)" in message(capsys)
    assert run("summary", "--run", student, "--model", "resnet20", "--weights", 2) == 1
    assert "run and --model, --weights exclude each other" in message(capsys)
    arguments = ["compare", *PLAIN, "--recipes", "plain", "--teacher-epochs", 1, "--scratch"]
    assert run(*arguments, "--output", tmp_path / "c") == 1
    assert "scratch and teacher_epochs exclude each other" in message(capsys)


def test_a_teacher_of_other_images_is_told_by_its_tensors(teacher, tmp_path, capsys):
    """Found: "of another architecture", without a word on what differs."""
    data = tmp_path / "colour"
    for label in ("cats", "dogs"):
        (data / label).mkdir(parents=True)
        for number in range(10):
            picture = np.full((8, 8, 3), 20 * number, dtype=np.uint8)
            Image.fromarray(picture).save(data / label / f"{number}.png")
    code = run("train", "--model", "resnet20", "--data", f"folder:{data}", "--image-size", 8, "--teacher", teacher,
               "--batch-size", 4, "--output", tmp_path / "out")  # fmt: skip
    assert code == 1
    assert "conv1.weight is (16, 1, 3, 3) in the teacher, (16, 3, 3, 3) in the student" in message(capsys)


def test_a_run_on_a_folder_is_read_from_another_directory(tmp_path, monkeypatch, capsys):
    """Found: the folder was kept as it was typed."""
    rng = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (tmp_path / "good" / label).mkdir(parents=True)
        for number in range(10):
            picture = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "good" / label / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    code = run("train", "--model", "resnet20", "--data", "folder:good", "--image-size", 8, "--recipe", "float",
               "--lr", 1e-4, "--epochs", 1, "--batch-size", 4, "--output", tmp_path / "run")  # fmt: skip
    assert code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_data(tmp_path / "run").num_classes == 2


def test_resume_with_other_settings_names_them(student, teacher, capsys):
    assert run(*student_of(teacher, student, "--resume", "--weight-decay", "0.5")) == 1
    assert "settings.weight_decay: 0.0001 there, 0.5 now" in message(capsys)


def test_resume_without_a_run_starts_afresh(teacher, tmp_path):
    assert run(*student_of(teacher, tmp_path / "new", "--resume", "--epochs", "0.2")) == 0


def test_a_folder_with_a_run_is_not_overwritten(student, teacher, capsys):
    assert run(*student_of(teacher, student)) == 1
    assert "already holds a run; pass --resume" in message(capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet21", "--data", "digits"], "did you mean resnet32"),
        (["--model", "resnet20", "--data", "digitz"], "did you mean digits"),
        (["--model", "resnet20", "--data", "digits", "--recipe", "qdf"], "did you mean qfd"),
        (["--model", "resnet20", "--data", "digits", "--weights", "9"], "between 1 and 8, got 9"),
        (["--model", "resnet20", "--data", "digits", "--weights", "0"], "between 1 and 8, got 0"),
        (["--model", "resnet20", "--data", "digits", "--quantizer", "lsqq"], "did you mean lsq"),
        (["--model", "resnet20", "--data", "digits", "--keep", "nothing.*", "--scratch"], "matches no layer"),
        (["--model", "resnet20", "--data", "digits"], "--recipe float"),
        (["--model", "resnet20", "--data", "digits", "--recipe", "qfd", "--scratch"], "--recipe float"),
        (["--model", "resnet20", "--data", "digits", "--teacher", "nowhere"], "does not exist"),
        (["--model", "resnet20", "--data", "digits", "--options", "weight"], "name=value"),
        (["--model", "resnet20", "--data", "digits", "--options", "wait=1"], "no option 'wait'"),
        (["--model", "resnet20", "--data", "digits", "--scratch", "--batch-size", "99999"], "batch_size"),
        (["--model", "resnet20", "--data", "digits", "--residual", "many"], "residual must be"),
        (["--model", "resnet20", "--data", "folder:nowhere"], "nowhere is not a folder (looked for /"),
        ([*FLOAT, "--teacher", "x"], "recipe 'float' takes no teacher, got x; to start from its weights pass --checkp"),
        ([*FLOAT, "--weights", 2, "--keep", "fc"], "so --weights, --keep would have no effect; leave that out"),
        ([*PLAIN, "--options", "label_smoothing=2"], "fewbits: label_smoothing must be a number from 0 to 1, got 2"),
        ([*PLAIN, "--lr", "-1"], "fewbits: lr must be a number above 0, got -1.0"),
        ([*PLAIN, "--batch-size", 10, "--accumulate", 4], "fewbits: batch_size must be a multiple of accumulate"),
        ([*PLAIN, "--seed", "9" * 23], "fewbits: seed must be a whole number from 0 to 2^63 - 1, got 9999"),
        ([*PLAIN, "--milestones", 0.5, 3], "fewbits: milestones must be a list, each a number between 0 and 1"),
        ([*PLAIN, "--scratch", "--checkpoint", "x.pt"], "scratch and checkpoint exclude each other"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, said, capsys, tmp_path):
    assert run("train", *arguments, "--output", tmp_path / "out", "--no-progress") == 1
    printed = message(capsys)
    assert said in printed
    assert "tyro" not in printed
    assert not (tmp_path / "out").exists()


def test_wrong_usage_leaves_with_two():
    named = ["train", "--model", "resnet20", "--data", "digits"]
    for arguments in (["trane"], ["train"], [*named, "--weights", "four"], [*named, "--optimizer", "adam"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2


def test_a_checkpoint_of_another_network_lists_keys_and_shapes(teacher, tmp_path, capsys):
    file = teacher / "student.safetensors"
    code = run("train", "--model", "vgg-small", "--data", "digits", "--checkpoint", file, "--output", tmp_path / "x")
    assert code == 1
    said = message(capsys)
    assert "missing" in said
    assert "stage1" in said


def test_a_truncated_and_a_malicious_checkpoint_are_refused(teacher, tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((teacher / "student.safetensors").read_bytes()[:1000])
    evil = tmp_path / "evil.pt"
    evil.write_bytes(b"cbuiltins\neval\n(S'open(\"" + str(tmp_path / "owned").encode() + b'","w")\'\ntR.')
    for file in (cut, evil):
        assert (
            run("train", "--model", "resnet20", "--data", "digits", "--checkpoint", file, "--output", tmp_path / "y")
            == 1
        )
        assert file.name in message(capsys)
    assert not (tmp_path / "owned").exists()


def test_bad_image_folders_are_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    one = tmp_path / "one" / "cats"
    one.mkdir(parents=True)
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(one / "a.png")
    (tmp_path / "empty").mkdir()
    for name in ("one", "empty"):
        code = run("train", "--model", "resnet20", "--data", f"folder:{tmp_path / name}", "--recipe", "float",
                   "--output", tmp_path / "z")  # fmt: skip
        assert code == 1
        assert name in message(capsys)


def test_an_unfinished_run_is_not_exported(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    for command in ("export", "bench"):
        assert run(command, tmp_path) == 1
        assert "not finished" in message(capsys)
    assert run("export", tmp_path / "none") == 1
    assert "no run folder" in message(capsys)


def test_data_and_recipes_are_listed(capsys):
    assert run("data") == 0
    assert run("recipes") == 0
    printed = capsys.readouterr().out
    for name in ("digits", "cifar10", *RECIPES):
        assert name in printed


def test_options_are_read_as_json():
    assert parse_options(["bits=4", "reduction=mean"]) == {"bits": 4, "reduction": "mean"}


def test_options_are_read_as_recipes_prints_them():
    """Found: of what 'fewbits recipes' prints, (8, 4), True and None were taken for text and refused."""
    for name, function in RECIPES.items():
        printed = [f"{p.name}={p.default}" for p in inspect.signature(function).parameters.values()]
        assert make(name, parse_options(printed)) == make(name), name
    assert parse_options(["bits=(8, 4)", "bits2=8,4", "taps=a.0,b"]) == {
        "bits": (8, 4),
        "bits2": (8, 4),
        "taps": "a.0,b",
    }


def test_blockwise_at_more_than_one_bit_names_the_way_out(tmp_path, capsys):
    """Found: the message said to use lsq, which is not what the recipe is about."""
    assert run("train", "--model", "resnet20", "--data", "digits", "--recipe", "blockwise", "--output", tmp_path) == 1
    assert "got --weights 4 and --activations 4; add --weights 1 --activations 1" in message(capsys)


def test_help_names_every_command():
    printed = subprocess.run(
        [sys.executable, "-m", "fewbits", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in COMMANDS:
        assert name in printed


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (["data"], "lacks data.channels, data.classes, data.image_size, data.name; put back"),
        (["normalisation", "std"], "lacks normalisation.std; put back"),
        (["plan", "rules"], "the plan in run.json is damaged"),
    ],
)
def test_a_run_whose_description_lost_entries_names_them(lost, said, student, tmp_path, capsys):
    run_json = json.loads((student / "run.json").read_text())
    inner = run_json
    for name in lost[:-1]:
        inner = inner[name]
    del inner[lost[-1]]
    shutil.copy(student / "student.safetensors", tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(run_json))
    for arguments in (["export", tmp_path], ["bench", tmp_path], ["summary", "--run", tmp_path]):
        assert run(*arguments) == 1
        assert said in message(capsys)


def test_a_file_where_the_run_should_go(teacher, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(*student_of(teacher, tmp_path / "file")) == 1
    assert "output must be a folder, but" in message(capsys)
    assert (tmp_path / "file").read_text() == "mine"
