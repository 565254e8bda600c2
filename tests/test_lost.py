"""No work is lost: signals, full disks, torn files, loader processes that die; weights as they are found."""

import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import built, checkpoint, lines, resume, run, run_files, write_jsonl
from test_engine import bert_names, timm_names
from test_model import SMALL, make_model
from torch.utils.data import DataLoader

import finetune
import train
from engine.batches import load_batches
from engine.checkpoints import load_checkpoint
from engine.finetune_config import parse_config
from engine.flags import ConfigError
from engine.log import final_metrics, ignore_signals, read_metrics, trim_metrics
from engine.weights import load_pretrained
from evaluation.search import search
from evaluation.validation import predict_batch
from readers.dataset import DataError
from readers.prompts import SYMBOLS
from tutorial.exercises import catalogue, compare, start

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of one step on photos of three categories; the commonest of validation is not in training."""
    folder = tmp_path_factory.mktemp("pretrained")
    names = {"train": ["TOPS"] * 9 + ["HATS"] * 5, "val": ["BAGS"] * 6 + ["HATS"] * 3 + ["TOPS"]}
    records = {}
    for split, categories in names.items():
        records[split] = []
        for number, category in enumerate(categories):
            record = {"image": f"{split}{number}.png", "caption": f"été 服 {number}", "product_id": f"{split}{number}"}
            records[split].append(record | {"category": category})
    write_jsonl(folder / "photos", **records)
    run_files(folder / "out", folder / "photos", "--preset", "tiny", "--steps", "1")
    return folder / "out" / "last.pt"


def command(flags):
    config, given, source = parse_config(flags.split())
    return search(config, source) if config.task == "search" else finetune.finetune(config, given, source)


# --- signals and loader processes ---


def signal_every_process(function):
    """Let another process send SIGTERM to this process and its children before the first call of a function."""
    calls = []

    def signalled(*args):
        if not calls:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            assert len(pids) >= 3
            subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)
        calls.append(1)
        return function(*args)

    return signalled


@pytest.mark.parametrize("where", ["training", "validation", "fine-tuning"])
def test_sigterm_to_every_process_saves_and_exits(tmp_path, monkeypatch, capsys, pretrained, where):
    flags = "--steps 3 --val-every 1 --workers 2"
    if where == "fine-tuning":
        monkeypatch.setattr(finetune, "retrieval_losses", signal_every_process(finetune.retrieval_losses))
        assert command(f"--task retrieval --checkpoint {pretrained} --out {tmp_path} {flags}") is None
    else:
        if where == "training":
            monkeypatch.setitem(train.RECIPES, "syncmask", signal_every_process(train.syncmask))
        else:
            monkeypatch.setattr("evaluation.validation.predict_batch", signal_every_process(predict_batch))
        assert run(tmp_path, *flags.split()) is None
    assert "(SIGTERM); saved in" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == (2 if where == "validation" else 1)


def act_as_loader_process(pipe, queue):
    ignore_signals(0)
    pipe.send("ready")
    queue.put(pipe.recv() or (lambda: "cannot be sent"))
    time.sleep(60)


@pytest.fixture
def loader_process():
    """A process that ignores signals as those of a loader, then puts what it gets into a queue, None as a function."""
    processes = multiprocessing.get_context("fork")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=act_as_loader_process, args=(theirs, processes.Queue()), daemon=True)
    process.start()
    assert ours.recv() == "ready"
    yield process, ours
    process.kill()


def test_a_loader_process_ignores_signals(loader_process):
    process, _ = loader_process
    for name in ("TERM", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    process.join(0.2)
    assert process.is_alive()


def test_loader_processes_end_with_an_error_of_the_main_process():
    program = """
import sys
sys.path[:0] = [".", "tests"]
from engine.batches import endless_batches
from engine.run import build_sampler
from small import built
state, dataset = built("--workers 2")
state.sampler = build_sampler(state, dataset)
batches = endless_batches(state, dataset)
next(batches)
raise ZeroDivisionError
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError\n")


def test_a_loader_process_ends_where_it_cannot_send_a_batch(loader_process):
    process, pipe = loader_process
    pipe.send(None)
    process.join(10)
    assert process.exitcode == 1


FAILURES = [
    RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
    RuntimeError("Too many open files. Communication with the workers is no longer possible."),
    OSError(24, "Too many open files"),
    EOFError(),
]


FAILED = r"a data loading process failed \(.+\), perhaps for lack of memory, .*ulimit -n\); "


@pytest.fixture
def failing(monkeypatch):
    """A list of one error, which data loading processes raise."""
    failures = [FAILURES[0]]

    start = DataLoader.__iter__

    def fail(loader):
        if loader.num_workers:
            raise failures[0]
        return start(loader)

    monkeypatch.setattr(DataLoader, "__iter__", fail)
    return failures


def test_a_failing_loader_process_is_one_line_wherever_it_is(tmp_path, pretrained, failing):
    with pytest.raises(DataError, match=FAILED + "start again with fewer --workers$"):
        run(tmp_path / "first", "--steps", "2", "--workers", "1")
    for task in ("retrieval --eval-only", "search --query 7"):
        with pytest.raises(DataError, match=FAILED + "start again with fewer --workers$"):
            command(f"--task {task} --checkpoint {pretrained} --out {tmp_path}/{task[:3]} --workers 1")
    run(tmp_path / "second", "--steps", "2", stop_at=1)
    with pytest.raises(DataError, match=FAILED + "continue with --resume and fewer --workers$"):
        resume(tmp_path / "second", "--workers", "1")


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_each_failure_of_loader_processes_is_one_line(failing, failure):
    failing[0] = failure
    state, dataset = built()
    with pytest.raises(DataError, match=FAILED):
        list(load_batches(state, DataLoader(dataset, num_workers=1)))


def test_an_error_of_our_own_code_keeps_its_traceback(failing):
    failing[0] = RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
    state, dataset = built()
    with pytest.raises(RuntimeError, match="Caught"):
        list(load_batches(state, DataLoader(dataset, num_workers=1)))


# --- files on disk ---

LINE = json.dumps({"step": 1, "loss": 2.5}) + "\n"
TORN = {
    "half a line": LINE.encode() + b'{"step": 2, "lo',
    "zero bytes": LINE.encode() + b"\0" * 512,
    "zero bytes before": b"\0" * 512 + LINE.encode(),
    "no UTF-8": LINE.encode() + b"\xff\xfe\x80{\n",
    "no UTF-8 before": b"\xff\xfe\0\0\x80{\n" + LINE.encode(),
    "no objects": LINE.encode() + b'7\n[1]\nnull\n"step"\n{"loss": 1}\n{"step": "x"}\n' + b"[" * 100_000,
    "byte order mark": LINE.encode("utf-8-sig"),
    "PowerShell": LINE.replace("\n", "\r\n").encode("utf-16"),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", TORN)
def test_metrics_that_are_torn_keep_the_lines_that_are_whole(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(TORN[kind])
    expected = [json.loads(LINE)] if kind != "nothing" else []
    assert read_metrics(path) == expected and final_metrics(tmp_path) is None
    with pytest.raises(SystemExit, match="not finished"):
        compare.main([str(tmp_path), str(tmp_path)])
    trim_metrics(path, 1)
    assert lines(tmp_path) == expected


def test_a_full_disk_leaves_no_part_of_a_result_and_is_named(tmp_path, monkeypatch, pretrained):
    flags = f"--task retrieval --eval-only --checkpoint {pretrained} --out {tmp_path}/out"

    def fill(path, *_args, **_more):
        Path(path).touch()
        raise OSError(28, "No space left on device")

    def fill_index(_tensors, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", fill_index)
        search_flags = f"--task search --query 7 --checkpoint {pretrained} --index {tmp_path}/features.pt"
        with pytest.raises(SystemExit, match=f"finetune.py: {tmp_path}/features.pt: cannot be written .*failed.$"):
            finetune.main(search_flags.split())
    assert not list(tmp_path.iterdir())
    for target, file in (
        ("matplotlib.figure.Figure.savefig", "examples.png"),
        ("pathlib.Path.write_text", "results.json"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, fill if "Path" in target else lambda _figure, path, **_: fill(path))
            with pytest.raises(SystemExit, match=f"finetune.py: {tmp_path}/out/{file}: No space left on device"):
                finetune.main(flags.split())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["examples.png"]
    assert command(flags)["metrics"]


def test_a_file_without_the_right_to_read_is_not_damaged(tmp_path, pretrained):
    index = f"--task search --query 7 --checkpoint {pretrained} --index"
    with as_nobody(tmp_path) as secret:
        for read in (
            lambda: load_checkpoint(secret),
            lambda: load_pretrained(make_model(), [secret]),
            lambda: load_pretrained(make_model(), [secret.with_suffix(".safetensors")]),
        ):
            with pytest.raises(DataError, match="secret.*: cannot be read .Permission denied.; check .* permissions"):
                read()
    with pytest.raises(ConfigError, match="cannot be read .Is a directory"):
        command(f"{index} {tmp_path}")


@contextlib.contextmanager
def as_nobody(folder):
    """Give a file, and one in .safetensors, that may not be read; root becomes another user for a while."""
    is_root = os.geteuid() == 0
    for name in ("secret.pt", "secret.safetensors"):
        (folder / name).write_bytes(b"secret")
        (folder / name).chmod(0)
    try:
        if is_root:
            os.seteuid(65534)
        yield folder / "secret.pt"
    finally:
        if is_root:
            os.seteuid(0)


def test_an_exercise_begins_where_one_may_write(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(catalogue, "MINE", tmp_path / "file" / "mine")
    with pytest.raises(SystemExit, match="start.py: .*/file/mine: Not a directory; work in a copy"):
        start.main(["3"])


# --- output and messages ---


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_cannot_be_encoded_is_printed_with_question_marks(tmp_path, monkeypatch, pretrained, encoding):
    commands = [
        lambda: train.main(["--help"]),
        lambda: train.main(f"--resume --out {pretrained.parent} --root {pretrained.parent.parent}/photos".split()),
        lambda: finetune.main(f"--task search --query 服 --checkpoint {pretrained} --out {tmp_path}".split()),
    ]
    printed = []
    for start_command in commands:
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
        with contextlib.suppress(SystemExit):
            start_command()
        sys.stdout.flush()
        printed.append(output.getvalue().decode(encoding))
    assert "--recipe" in printed[0] and "done at step" in printed[1]
    assert ("  ?t? ? 7\n" if encoding == "ascii" else "  été ? 7\n") in printed[2]


def test_the_largest_seed_trains_and_validates(tmp_path):
    assert run(tmp_path, "--seed", str(2**63 - 1), "--steps", "1")["val_i2t_r1"] >= 0


def test_after_a_loss_that_is_not_finite_only_what_is_known_is_said(tmp_path):
    known = r"the loss was never below its start; .*last.pt is of step 1: --resume with a lower --lr$"
    with pytest.raises(train.NonFiniteLoss, match=known):
        flags = "--steps 3 --val-every 1 --log-every 1 --warmup 0 --lr 1e30 --min-lr 1e30"
        run(tmp_path, *flags.split())


# --- recognition ---


def test_chance_is_by_the_most_frequent_class_of_training(tmp_path, pretrained, capsys):
    flags = f"--task category --checkpoint {pretrained} --steps 1 --out {tmp_path}"
    results = command(f"{flags}/category")
    assert results["metrics"]["unseen_share"] == pytest.approx(0.6)
    assert results["chance"]["accuracy"] == pytest.approx(0.1) and results["protocol"]["most frequent"] == "TOPS"

    state = load_checkpoint(tmp_path / "category" / "best.pt")
    state["config"]["classes"] = tuple(f"\x1b[31m{name}\n" for name in state["config"]["classes"])
    torch.save(state, tmp_path / "colours.pt")
    flags = "--task category --eval-only --checkpoint"
    assert command(f"{flags} {tmp_path}/colours.pt --out {tmp_path}/colours")["chance"]
    assert "\x1b" not in capsys.readouterr().out + (tmp_path / "colours" / "classes.tsv").read_text()
    for names in ([f"class {number}" for number in range(27)], ["one"]):
        state["config"]["classes"] = tuple(names)
        torch.save(state, tmp_path / "names.pt")
        with pytest.raises(
            ConfigError, match=f"names.pt: has {len(names)} names of classes for a head of 2; give another"
        ):
            command(f"{flags} {tmp_path}/names.pt --out {tmp_path}/names")


# --- weights ---


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_checkpoint_of_ones_own_fills_all_of_the_model(tmp_path, pretrained, capsys, name):
    source = pretrained
    if name == "best.pt":
        command(f"--task retrieval --checkpoint {pretrained} --steps 1 --out {tmp_path}/tuned")
        source = tmp_path / "tuned" / name
    capsys.readouterr()
    flags = ["--preset", "tiny", "--weights", str(source), "--lr", "0", "--min-lr", "0", "--steps", "1"]
    run_files(tmp_path / "out", pretrained.parents[1] / "photos", *flags)
    assert " 0 skipped, 0 missing" in capsys.readouterr().out
    ours, theirs = checkpoint(tmp_path / "out"), load_checkpoint(source)
    for part, tensor in theirs["model"].items():
        assert torch.equal(ours["model"][part], tensor), part
    assert ours["tokenizer"] == theirs["tokenizer"] and ours["config"]["vocab"] == str(source)


def test_of_a_padded_word_table_the_rows_of_the_vocabulary_are_taken(tmp_path):
    for rows, words, symbols in ((64, 60, 0), (128, 60, 0), (72, 64, len(SYMBOLS)), (60, 60, len(SYMBOLS))):
        state = bert_names(rows) | {"cls.predictions.bias": torch.randn(rows)}
        torch.save(state, tmp_path / "bert.bin")
        model = make_model(replace(SMALL, vocab_size=words + symbols))
        before = model.text.word_embeddings.weight.detach().clone()
        report = load_pretrained(model, [tmp_path / "bert.bin"])
        after = model.text.word_embeddings.weight
        assert torch.equal(after[:words], state["embeddings.word_embeddings.weight"][:words])
        assert torch.equal(after[words:], before[words:]) and torch.equal(
            model.mlm_bias[:words], state["cls.predictions.bias"][:words]
        )
        assert (f"the first {words} of {rows} rows" in str(report)) == (rows > words)


def wrapped(vit, kind):
    """A ViT as a training run saves it."""
    other = {name: tensor + 1 for name, tensor in vit.items()}

    def prefix(text, state):
        return {text + name: tensor for name, tensor in state.items()} | {f"{text}head.weight": torch.zeros(3)}

    return {
        "DINO": {"student": prefix("module.backbone.", other), "teacher": prefix("backbone.", vit), "epoch": 3},
        "student": {"student": prefix("module.", vit)},
        "flat": prefix("student.backbone.", other) | prefix("teacher.backbone.", vit),
        "flat, teacher first": prefix("teacher.backbone.", vit) | prefix("student.backbone.", other),
        "MoCo": {"state_dict": prefix("module.base_encoder.", vit) | prefix("module.momentum_encoder.", other)},
        "compiled": {"model": prefix("_orig_mod.module.", vit)},
        "twice": {"state_dict": {"model": prefix("module.", vit)}},
        "scaled": vit | {"blocks.0.attn.qkv.weight_scale": torch.tensor(1.0)},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["DINO", "student", "flat", "flat, teacher first", "MoCo", "compiled", "twice", "scaled"]
)
def test_a_vit_is_unwrapped(tmp_path, kind):
    source, model = make_model(seed=1), make_model()
    torch.save(wrapped(timm_names(source.vision), kind), tmp_path / "vit.pth")
    load_pretrained(model, [tmp_path / "vit.pth"])
    for name, tensor in source.vision.named_parameters():
        assert name == "registers" or torch.equal(model.vision.get_parameter(name), tensor), name


def test_weights_of_another_model_are_refused_with_their_first_names(tmp_path):
    torch.save({f"stem.{number}": torch.zeros(2) for number in range(9)}, tmp_path / "cnn.pth")
    with pytest.raises(DataError, match="cnn.pth: no tensor has .* the first are stem.0, stem.1, stem.2$"):
        load_pretrained(make_model(), [tmp_path / "cnn.pth"])
    torch.save({"net": {"cls_token": torch.zeros(2)}, "epoch": 3}, tmp_path / "net.pth")
    with pytest.raises(DataError, match="net.pth: holds no tensors, the first keys are net, epoch; give a state dict"):
        load_pretrained(make_model(), [tmp_path / "net.pth"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_weights_of_few_bits_are_read(tmp_path, dtype):
    for state in (bert_names(), timm_names(make_model(seed=1).vision)):
        narrow = {name: tensor.to(dtype) for name, tensor in state.items() if tensor.is_floating_point()}
        save_file(narrow, tmp_path / "narrow.safetensors")
        torch.save(narrow, tmp_path / "narrow.pth")
        for file in ("narrow.safetensors", "narrow.pth"):
            model = make_model(replace(SMALL, image_size=64))
            assert len(load_pretrained(model, [tmp_path / file]).loaded) > 20
            if "cls_token" in narrow:
                assert torch.equal(model.vision.cls_token, narrow["cls_token"].float())
