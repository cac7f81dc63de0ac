r"""Step time and peak memory of low-bit training, as ratios to the float network in plain PyTorch, beside the peers.

Each row is a process of its own, so that its peak memory is its own; all have built, compiled and warmed up before the
first measured step, and then take one step in turn, round after round, so that whatever else the machine does hits all
of them alike. Our rows take the very step that ``fit`` takes (objective, guard, bounds, clipping, Nesterov SGD); float
and peers take a plain loop's. Memory is the peak of the process in one step before that, in which glibc's malloc gives
every larger piece back to the system at once: otherwise the holes between pieces count, a fifth more in one run than in
the next. While time is measured it keeps what it has, which helps every row alike.

    python benchmarks/train_step.py --quick --json steps.json     # ResNet-20, under five minutes
    python benchmarks/train_step.py                               # all four networks
    python benchmarks/train_step.py --networks vit-tiny --rows float "fewbits lsq 4/4"

Peers are an optional extra (pip install -c constraints.txt -e ".[peers]"); one that is absent is a row "not installed".
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import fcntl
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# Options of glibc's mallopt(): from which size on a piece of memory goes back to the system as soon as it is free; and,
# so that none does, how many such pieces there may be, when the heap shrinks, and by how much it grows.
M_MMAP_THRESHOLD = -3
KEEPS_WHAT_IT_HAS = {-4: 0, -1: 2**31 - 1, -2: 1 << 28}
WARM_UP, LR = 2, 0.01
QUICK_SECONDS, FEWEST = 280, 3
"""When a quick run ends its rounds, and how many it takes in any case."""


@dataclass(frozen=True)
class Network:
    """What is trained: a name for ``fewbits.models.build``, pixels, images a step, classes."""

    name: str
    size: int
    batch_size: int
    classes: int


NETWORKS = {
    "resnet20": Network("resnet20", 32, 128, 10),
    "resnet18": Network("timm:resnet18", 224, 16, 1000),
    "mobilenetv2": Network("timm:mobilenetv2_100", 224, 16, 1000),
    "vit-tiny": Network("timm:vit_tiny_patch16_224", 224, 16, 1000),
}


@dataclass(frozen=True)
class Row:
    """What takes a step.

    Args:
        who: float, fewbits, or a peer.
        bits: of weights and activations.
        recipe: of ours; anything but plain has a teacher of the student's architecture.
        compiled, channels_last, bf16, recompute: how it runs.
        teacher_bf16: whether the teacher alone computes in bf16.
        inference: of float: a forward pass in eval mode without gradients, which is what a teacher costs by itself.
        kept: whether the teacher's answers are read from disk (``teacher_cache``) instead of asked for.
        residual: whether residual streams have 8 bits, as by our default, or float shortcuts, as peers and papers have.
        quick: whether ``--quick`` measures it.
    """

    who: str
    bits: int = 32
    recipe: str = "plain"
    compiled: bool = False
    channels_last: bool = False
    bf16: bool = False
    recompute: bool = True
    teacher_bf16: bool = False
    inference: bool = False
    kept: bool = False
    residual: bool = True
    quick: bool = True

    @property
    def name(self) -> str:
        """As it is printed and chosen."""
        quantizer = {1: " binary"}.get(self.bits, f" lsq {self.bits}/{self.bits}") if self.who == "fewbits" else ""
        bits = f" {self.bits}/{self.bits}" if self.who not in ("float", "fewbits") else ""
        recipe = f" {self.recipe}" if self.recipe != "plain" else ""
        # Ours is channels-last by default where it is compiled.
        is_default = self.channels_last == (self.compiled and self.who == "fewbits")
        layout = "channels-last" if self.channels_last else "contiguous"
        ways = {"float shortcuts": not self.residual, "compiled": self.compiled}
        ways |= {"inference": self.inference, "answers kept": self.kept, "teacher in bf16": self.teacher_bf16}
        ways |= {layout: not is_default, "bf16": self.bf16, "nothing recomputed": not self.recompute}
        return f"{self.who}{quantizer}{bits}{recipe}" + "".join(f" {way}" for way, on in ways.items() if on)


def rows() -> list[Row]:
    """All of them; the first is what the others are compared with."""
    ours, compiled = Row("fewbits", 4), {"compiled": True, "channels_last": True}
    bf16, rarely = compiled | {"bf16": True}, {"quick": False}
    logits = replace(ours, recipe="logits")
    found = [Row("float"), Row("float", channels_last=True)]
    found += [Row("float", **compiled, inference=True)]
    found += [ours, replace(ours, bits=2), replace(ours, bits=1), replace(ours, residual=False)]
    found += [replace(ours, recompute=False, **rarely), replace(ours, channels_last=True)]
    found += [replace(ours, **compiled), replace(ours, **bf16)]
    # Two are compiled at a time: rows that share generated code are not neighbours.
    found += [replace(logits, **compiled), replace(logits, **bf16)]
    found += [logits, replace(logits, kept=True)]
    found += [Row("plain-lsq", 4), Row("torch.ao", 4), Row("brevitas", 4), Row("torchao", 4)]
    found += [Row("nncf", 8), Row("modelopt", 4)]
    found += [Row("float", compiled=True, **rarely), Row("float", **compiled, **rarely), Row("float", **bf16, **rarely)]
    found += [Row("float", **bf16, **rarely, inference=True), Row("plain-lsq", 4, **compiled, **rarely)]
    found += [replace(ours, compiled=True, **rarely), replace(ours, **compiled, **rarely, residual=False)]
    found += [replace(ours, **bf16, **rarely, residual=False)]
    found += [replace(ours, bits=bits, **compiled, **rarely) for bits in (2, 1)]
    found += [replace(logits, **compiled, **rarely, **ways) for ways in ({"kept": True}, {"teacher_bf16": True})]
    others = ("features", "ftl", "two-stage", "stochastic", "joint", "qfd", "dtq")
    found += [replace(ours, recipe=name, **ways, **rarely) for name in others for ways in ({}, compiled)]
    binary = replace(ours, bits=1, residual=False, recipe="blockwise")
    return found + [replace(binary, **ways, **rarely) for ways in ({}, compiled)]


@dataclass(frozen=True)
class Measured:
    """A row of the result.

    Args:
        name: of the row.
        network: that was trained.
        seconds: median of a step; None where there is none.
        ratio: of the medians, to eager float in the same run.
        memory_ratio: of the processes' peaks, likewise.
        layout: how images and kernels lie in memory.
        status: ``"measured"``, ``"not installed"``, or why not.
        all_seconds: every measured step.
    """

    name: str
    network: str
    seconds: float | None = None
    ratio: float | None = None
    memory_ratio: float | None = None
    layout: str = "contiguous"
    status: str = "measured"
    all_seconds: list[float] = field(default_factory=list)


class Worker:
    """A row's process: ``step()`` lets it take one and says how long that took."""

    def __init__(self, network: str, row: Row, threads: int) -> None:
        self.row = row
        command = [sys.executable, __file__, "--worker", network, json.dumps(asdict(row))]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.status = ""

    def ready(self) -> bool:
        """Wait until it is warm; False where it cannot be measured, and ``status`` says why."""
        self.status = self._read() or "failed; its error is above"
        return self.status == "measured"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, what: str) -> float:
        """Seconds of a ``step``, or bytes of the ``peak``."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def measure(network: str, chosen: Sequence[Row], rounds: int, threads: int, until: float = math.inf) -> list[Measured]:
    """All rows of one network in one interleaved run, whose rounds end early where it takes longer than ``until``."""
    found, workers = {}, []
    try:
        # Two at a time: the compiler of one works while the other starts.
        pairs = [chosen[i : i + 2] for i in range(0, len(chosen), 2)]
        for pair in pairs:
            started = [Worker(network, row, threads) for row in pair]
            for worker in started:
                if worker.ready():
                    workers.append(worker)
                else:
                    worker.stop()
                    found[worker.row.name] = Measured(worker.row.name, network, status=worker.status)
        seconds: dict[str, list[float]] = {worker.row.name: [] for worker in workers}
        for number in range(rounds):
            if number >= FEWEST and time.monotonic() > until:
                break
            # There and back again: nobody always follows the same neighbour.
            for worker in workers if number % 2 == 0 else workers[::-1]:
                seconds[worker.row.name].append(worker.ask("step"))
        peaks = {worker.row.name: worker.ask("peak") for worker in workers}
    finally:
        for worker in workers:
            worker.stop()
    first = chosen[0].name
    for worker in workers:
        row, taken = worker.row, seconds[worker.row.name]
        found[row.name] = Measured(
            row.name,
            network,
            statistics.median(taken),
            statistics.median(taken) / statistics.median(seconds[first]),
            peaks[row.name] / peaks[first],
            "channels-last" if row.channels_last else "contiguous",
            all_seconds=[round(each, 5) for each in taken],
        )
    return [found[row.name] for row in chosen]


def work(network: Network, row: Row) -> None:
    """The worker's side: build, warm up, answer."""
    # What a peer prints of itself goes where errors go: the answers have this pipe for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import peers
    import torch

    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 21)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two rows are built at a time
    images = torch.randn(network.batch_size, 3, network.size, network.size)
    labels = torch.randint(network.classes, (network.batch_size,))
    try:
        step = (our_step if row.who == "fewbits" else plain_step)(network, row, images, labels)
    except ImportError as missing:
        absent = row.who in peers.PEERS and getattr(missing, "name", None) not in (None, "fewbits")
        return print("not installed" if absent else f"failed: {missing}", file=answers)
    except NotImplementedError as reason:
        return print(str(reason), file=answers)
    torch.set_num_threads(threads)
    # Compilers work side by side; threads of steps would wait for each other, spinning.
    with Path(__file__).open() as turn:
        if not row.compiled:
            fcntl.flock(turn, fcntl.LOCK_EX)
        most = peak(step)
    for option, value in KEEPS_WHAT_IT_HAS.items():
        ctypes.CDLL("libc.so.6").mallopt(option, value)
    step()
    print("measured", file=answers)
    for line in sys.stdin:
        if line.strip() == "peak":
            print(most, file=answers)
            continue
        started = time.perf_counter()
        step()
        print(time.perf_counter() - started, file=answers)
    return None


def peak(step: Callable[[], None]) -> int:
    """Bytes of this process at most, in the step behind two that compile and warm up."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    for _ in range(WARM_UP):
        step()
    gc.collect()
    libc.malloc_trim(0)  # what the compiler freed goes, too
    Path("/proc/self/clear_refs").write_text("5")
    step()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def plain_step(network: Network, row: Row, images: Any, labels: Any) -> Callable[[], None]:
    """The step of a plain PyTorch loop, for the float network and the peers'."""
    import peers
    import torch

    import fewbits as fb

    model: Any = fb.models.build(network.name, num_classes=network.classes, image_size=network.size)
    if row.who != "float":
        model = peers.build(row.who, model, images, row.bits)
    if row.channels_last:
        model, images = (each.to(memory_format=torch.channels_last) for each in (model, images))
    model.train()
    run = torch.compile(model) if row.compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)

    if row.inference:
        model.eval()

    def infer() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=row.bf16):
            run(images)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=row.bf16):
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return infer if row.inference else step


def our_step(network: Network, row: Row, images: Any, labels: Any) -> Callable[[], None]:
    """The step that ``fit`` takes."""
    import torch

    import fewbits as fb
    from fewbits.training import Settings
    from fewbits.training.setup import make_accelerator
    from fewbits.training.step import Stepper

    teacher = fb.models.build(network.name, num_classes=network.classes, image_size=network.size)
    student = fb.quantize(teacher, row.bits, row.bits, residual="auto" if row.residual else None)
    recipe = fb.recipes.make(row.recipe)
    settings = Settings(
        lr=LR,
        batch_size=network.batch_size,
        compile=row.compiled,
        channels_last=row.channels_last,
        recompute=row.recompute,
        precision="bf16" if row.bf16 else "fp32",
        teacher_precision="bf16" if row.teacher_bf16 else "same",
        device="cpu",
    )
    if row.channels_last:
        student, images = (each.to(memory_format=torch.channels_last) for each in (student, images))
        teacher = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    last = len(recipe.phases()) - 1
    objective, networks = None, None
    for phase in range(last + 1):
        objective = recipe.objective(
            student, teacher if recipe.teacher.needs_teacher else None, batches=[images], phase=phase, networks=networks
        )
        networks = objective.networks
        if phase < last:
            objective.close()
    assert objective is not None
    accelerator = make_accelerator(settings)
    stepper = Stepper(objective, settings, accelerator)
    answered = kept_answers(objective, settings, accelerator, images, labels) if row.kept else tuple
    taken = 0

    def step() -> None:
        nonlocal taken
        objective.set_progress(0.5, taken)
        stepper(images, labels, 1.0, f"step {taken}", answered())
        taken += 1

    return step


def kept_answers(objective: Any, settings: Any, accelerator: Any, images: Any, labels: Any) -> Callable[[], Any]:
    """The teacher's answers to this batch, read from disk and checked each time, as ``fit`` does it."""
    import torch

    import fewbits as fb
    from fewbits.training.feed import Batch, Feed
    from fewbits.training.teacher_cache import TeacherCache

    pixels = (images.contiguous().clamp(0, 1), labels)
    data = fb.data.Dataset.from_tensors("one batch", train=pixels, test=pixels)
    feed = Feed(data, data.normalisation, settings, accelerator)
    cache = TeacherCache(Path(tempfile.mkdtemp()), objective, feed, settings)
    batch = Batch(images, labels, torch.arange(len(images)))
    return lambda: cache(batch)


def table(measured: Sequence[Measured]) -> str:
    """In Markdown."""
    lines = ["| network | row | layout | step, ms | ratio to float | peak memory, ratio |", "|---|---|---|---|---|---|"]
    for row in measured:
        if row.seconds is None:
            lines.append(f"| {row.network} | {row.name} | | {row.status} | | |")
        else:
            lines.append(
                f"| {row.network} | {row.name} | {row.layout} | {1e3 * row.seconds:.0f} "
                f"| {row.ratio:.2f} | {row.memory_ratio:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-20, without the rarer rows")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", help="only these rows, by name; eager float is always measured")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the rows to this file, a JSON list")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        network, row = arguments.worker
        work(NETWORKS[network], Row(**json.loads(row)))
        return
    chosen = [row for row in rows() if row.quick or not arguments.quick]
    if arguments.rows:
        unknown = set(arguments.rows) - {row.name for row in chosen}
        if unknown:
            parser.error(f"--rows: no {sorted(unknown)}; there are: {', '.join(row.name for row in chosen)}")
        chosen = [row for row in chosen if row.name in arguments.rows or row.name == "float"]
    measured = []
    until = time.monotonic() + QUICK_SECONDS if arguments.quick else math.inf
    for network in ["resnet20"] if arguments.quick else arguments.networks:
        measured += measure(network, chosen, arguments.rounds, arguments.threads, until)
        if arguments.json:
            described = [asdict(row) for row in measured]
            arguments.json.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in described) + "\n]\n")
    print(table(measured))


if __name__ == "__main__":
    main()
