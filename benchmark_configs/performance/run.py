"""Measure this package on your machine, beside other SAE libraries and the floor of the hardware.

    python benchmark_configs/performance/run.py [--device cpu | cuda] [--only training quality steering extraction ...]
        [--rounds 5] [--quick] [--out performance.json] [--python NAME=PATH ...]

What is measured, and how, is in the README.md beside this file. Every figure is written to the JSON file as soon as it
is there; a Markdown file of the same name holds the tables. The device is the GPU where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
#: What is measured on a device, in this order.
PARTS = {
    "cpu": ("training", "shapes", "quality", "steering", "strength", "extraction", "gallery"),
    "cuda": ("training", "steering", "strength", "extraction", "gallery"),
}
#: What competes: of this machine and this package, of other libraries, at other shapes, and in FVU.
OWN = {
    "cpu": ("floor", "floor_bfloat16", "vs2", "vs2_float32", "dense", "dense_bfloat16"),
    "cuda": ("floor", "floor_tf32", "floor_bfloat16", "vs2", "dense", "dense_bfloat16", "dense_compiled"),
}
PEERS = ("sparsify", "sparsify_adam", "saelens", "overcomplete", "dictionary_learning", "latentsae")
#: Options of theirs that are for a GPU, and a library that is made for one.
GPU_PEERS = ("saelens_autocast", "overcomplete_amp", "dictionary_learning_autocast", "saev")
AT_DEFAULTS = ("sparsify", "saelens", "overcomplete", "dictionary_learning", "latentsae")
AT_OTHER_SHAPES = ("floor", "floor_bfloat16", "vs2", "vs2_float32", "dense", *AT_DEFAULTS)
KNOWN = tuple(dict.fromkeys([*OWN["cpu"], *OWN["cuda"], *PEERS, *GPU_PEERS]))
PACKAGES = (
    "torch triton open_clip_torch numpy vs2-plugin eai-sparsify sae-lens overcomplete dictionary-learning latentsae "
    "saev faiss-cpu"
).split()

#: Name -> the value of a full run, and of a quick one, which only shows that all works.
SETTINGS = {
    "shape": ((768, 3072, 64), (64, 256, 8)),
    "other_shapes": ([(768, 3072, 256), (1024, 10240, 128)], [(64, 256, 16)]),
    "batch": (4096, 256),
    "steps": (20, 3),
    "seconds": (1.2, 0.5),
    "patience": (None, None),
    "limits": ({}, {}),
    "stored": (100_000, 5_000),
    "samples": (500_000, 10_000),
    "seeds": ([0, 1, 2], [0]),
    "sizes": ([900, 6_000, 50_000, 1_000_000], [900]),
    "images": (1024, 64),
    "workers": (2, 2),
    "extraction_rounds": (0, 0),
    "starts": (7, 1),
    "cached": ([20_000, 1_000_000], [2_000, 20_000]),
    "cached_samples": (100_000, 2_000),
    "steered": (["vs2", "vs2pp"], ["vs2"]),
    "galleries": ([50_000], [1_000]),
    "steering_batches": ([64], [2]),
    "looked_up": (1_000_000, 2_000),
    "chosen_on": ((10_000, 1_000), (100, 10)),
}
#: The same where they differ on a GPU.
GPU_SETTINGS = {
    "other_shapes": ([(768, 49152, 64), (1024, 10240, 128)], [(64, 512, 16)]),
    "steps": (20, 3),
    "seconds": (0.15, 0.05),
    "patience": (120.0, 120.0),  # seconds for an answer, and a process that gives none is ended
    "limits": ({"training": 150.0, "steering": 75.0, "strength": 30.0, "extraction": 60.0, "gallery": 45.0}, {}),
    "stored": (8 * 4096, 2_048),  # 100 MB and more of batches, larger than a GPU's L2 cache
    "images": (4096, 64),
    "workers": (16, 2),
    "extraction_rounds": (3, 1),
    "starts": (0, 0),
    "cached": ([], []),
    "steered": (["vs2", "vs2pp", "vs2s@alpha=1@p=2"], ["vs2"]),
    "galleries": ([1_000_000, 50_000], [1_000]),
    "steering_batches": ([64, 256], [2]),
}

_FACTS = """
import json, sys, torch
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
facts = {"threads": torch.get_num_threads(), "versions": found, "build": torch.__config__.show()}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    facts["gpu"] = {"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1), "cuda": torch.version.cuda}
print(json.dumps(facts))
"""


class Suite:
    """The measurements, and where they go."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.pythons = dict(text.split("=", 1) for text in args.python)
        # For all alike: threads sleep while they wait, so that those whose turn it is not take no time.
        self.environment = {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled", **os.environ}
        self.environment["TMPDIR"] = str(scratch)  # what a process leaves behind goes with all else
        self.started = time.monotonic()
        machine = self._machine()
        self.gpu: dict | None = machine["libraries"].get("gpu")
        self.device = args.device or ("cuda" if self.gpu else "cpu")
        if self.device == "cpu":
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "SPARSIFY_DISABLE_TRITON": "1"}
        else:
            self.environment.pop("SPARSIFY_DISABLE_TRITON", None)
        values = {**SETTINGS, **(GPU_SETTINGS if self.device == "cuda" else {})}
        self.settings = {name: pair[args.quick] for name, pair in values.items()}
        self.settings["sizes"] = args.sizes or self.settings["sizes"]
        self.settings["seconds"] = args.seconds or self.settings["seconds"]
        self.settings["limits"] = self.settings["limits"] | {
            part: float(seconds) for part, _, seconds in (text.partition("=") for text in args.limit)
        }
        self.ends = math.inf
        self.results: dict = {
            "machine": machine, "device": self.device, "quick": args.quick, "settings": self.settings
        }  # fmt: skip

    def say(self, *words: object) -> None:
        """Tell how far it is."""
        print(f"[{time.monotonic() - self.started:5.0f} s]", *words, flush=True)

    def measure(self, part: str) -> None:
        """Measure one part, within its limit: what is not measured by then is left out."""
        self.ends = time.monotonic() + self.settings["limits"].get(part, math.inf)
        getattr(self, part)()

    def left(self) -> float | None:
        """Seconds left of the part's limit, if it has one."""
        return None if self.ends == math.inf else max(1.0, self.ends - time.monotonic())

    def save(self) -> None:
        """Write what there is."""
        scratch = self.args.out.with_suffix(".partial")
        scratch.write_text(json.dumps(self.results, indent=1) + "\n")
        scratch.replace(self.args.out)
        self.args.out.with_suffix(".md").write_text(tables(self.results))

    def _machine(self) -> dict:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        facts = {"": sys.executable, **self.pythons}
        return {
            "cpu": named[0] if named else platform.processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "system": platform.platform(),
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "load_before": os.getloadavg(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **{
                ("libraries" if not name else f"libraries of {name}"): json.loads(
                    subprocess.run(
                        [python, "-c", _FACTS, *PACKAGES],
                        env=self.environment, capture_output=True, text=True, check=True,
                    ).stdout
                )
                for name, python in facts.items()
            },
        }  # fmt: skip

    def command(self, script: str, *words: object, implementation: str = "") -> list[str]:
        """A script of this folder, run by the interpreter that has the implementation."""
        python = self.pythons.get(implementation, sys.executable)
        named = ["--implementation", implementation] if implementation else []
        return [python, str(HERE / script), *named, *map(str, words)]

    def run(self, script: str, *words: object, implementation: str = "") -> dict:
        """Run a script to its end; its last line of JSON, or why there is none."""
        command = self.command(script, *words, implementation=implementation)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            try:
                code: int | str = subprocess.run(
                    command, env=self.environment, stdout=out, stderr=errors, check=False, timeout=self.left()
                ).returncode
            except subprocess.TimeoutExpired:
                code = "time limit"
            out.seek(0)
            errors.seek(0)
            lines = [line for line in out.read().splitlines() if line.startswith("{")]
            found = json.loads(lines[-1]) if lines else {}
            if code == "time limit":
                found["cut_short"] = True
            return found if lines else {"failed": last_line(errors.read(), code)}

    def activations(self, d: int, count: int = 0, dtype: str = "float32") -> Path:
        """Synthetic activations of a width, written when first asked for."""
        count = count or self.settings["stored"]
        path = self.scratch / f"activations-{d}-{count}-{dtype}"
        if not path.exists():
            self.say(f"writing {count:,} synthetic activations of width {d}, {dtype}")
            subprocess.run(self.command("synthetic.py", path, d, count, dtype), check=True, env=self.environment)
        return path

    # -- the parts ---------------------------------------------------------------------------------------------------

    def training(self) -> None:
        """Training speed of all. On a GPU, at all shapes: there it takes longer to start a process than to measure."""
        shapes = [self.settings["shape"]]
        if self.device == "cuda":
            shapes += self.settings["other_shapes"]
        peers = PEERS if self.device == "cpu" else [*PEERS, *GPU_PEERS]
        self._turns("training", shapes, [*OWN[self.device], *peers], self.args.rounds)

    def shapes(self) -> None:
        """Training speed at other shapes."""
        for shape in self.settings["other_shapes"]:  # in new processes: the peak memory of one never falls
            self._turns("shapes", [shape], AT_OTHER_SHAPES, min(3, self.args.rounds))

    def _turns(self, part: str, shapes: Sequence[Sequence[int]], names: Sequence[str], rounds: int) -> None:
        """At the first shape there are so many rounds, at the others three."""
        names = [name for name in names if self.args.implementations is None or name in self.args.implementations]
        rows = self.results.setdefault(part, [])
        words = ["--device", self.device, "--steps", self.settings["steps"], "--seconds", self.settings["seconds"]]
        with contextlib.ExitStack() as stack:
            workers = []
            for number, shape in enumerate(shapes):
                facts = dict(zip("dnk", shape, strict=True)) | {"batch": self.settings["batch"]}
                order = {**facts, "activations": str(self.activations(shape[0]))}
                if not workers:
                    words += [word for name, value in order.items() for word in (f"--{name}", value)]
                    workers = [
                        Worker(
                            name,
                            self.command("training.py", *words, "--turns", implementation=name),
                            self.environment,
                            self.settings["patience"],
                        )
                        for name in names
                    ]
                    for worker in workers:
                        stack.callback(worker.end)
                own = [{"implementation": name, **facts, "turns": []} for name in names]
                rows += own
                self._start(workers, own, order)
                for turn in range(rounds if number == 0 else min(3, rounds)):
                    for worker in workers if turn % 2 == 0 else reversed(workers):
                        if time.monotonic() > self.ends:
                            return
                        worker.turn()
                        summarize(own)
                        self.save()
                    self.say(f"round {turn + 1} at {shape}: " + ", ".join(map(brief, own)))
                if len(shapes) > 1:
                    print("\n" + "\n".join(training_table(shape_of(own[0]), own)) + "\n", flush=True)

    def _start(self, workers: Sequence[Worker], rows: Sequence[dict], order: Mapping[str, object]) -> None:
        """Let workers train until they are warm: on a GPU as many at once as its memory surely holds."""
        together = 1
        if self.gpu is not None and self.device == "cuda":
            needed = 32 * order["batch"] * order["n"]  # some eight dense float32 codes
            together = max(1, int(0.3e9 * self.gpu["memory_gb"] / needed))
        for start in range(0, len(workers), together):
            some = list(zip(workers, rows, strict=True))[start : start + together]
            for worker, row in some:
                worker.begin(row, order)
            for worker, row in some:
                ready = worker.ready()
                self.say(f"{worker.name}:", "ready" if ready else f"not measured, {row['failed']}")
                self.save()

    def quality(self) -> None:
        """FVU and dead latents at each one's defaults."""
        d, n, k = self.settings["shape"]
        rows = self.results.setdefault("quality", [])
        shape = ["--d", d, "--n", n, "--k", k, "--batch", self.settings["batch"]]

        def measure(name: str, activations: Path, **options: object) -> dict:
            words = [word for option, value in options.items() for word in (f"--{option}", value)]
            row = {"implementation": name, **options}
            row |= self.run("quality.py", *shape, "--activations", activations, *words, implementation=name)
            rows.append(row)
            told = row.get("failed") or f"FVU {row['fvu']:.4f}, dead {row['dead']:.2%}, {row['seconds']:.1f} s"
            self.say(f"quality of {name} {options}: {told}")
            self.save()
            return row

        samples = self.settings["samples"]
        wanted = self.args.implementations or ["vs2", *AT_DEFAULTS]
        seconds = 0.0
        if "vs2" in wanted:
            own = [measure("vs2", self.activations(d), samples=samples, seed=seed) for seed in self.settings["seeds"]]
            seconds = statistics.median([row.get("seconds", 0.0) for row in own])
        for name in wanted:
            if name in PEERS:
                measure(name, self.activations(d), samples=samples, seed=0, at=seconds)
        if "vs2" in wanted:
            # As in the cache of vs2-train-sae: float16, in a mapped file.
            cached = self.activations(d, max(self.settings["sizes"]) + 10_000, "float16")
            for size in self.settings["sizes"]:
                measure("vs2", cached, samples=0, seed=0, count=size, dtype="float16")

    def steering(self) -> None:
        """Time of steered calls over plain ones."""
        file = self.args.out.with_name(f"{self.args.out.stem}-steering.json")
        words = ["--device", self.device, "--rounds", max(self.args.rounds, 11 if self.device == "cuda" else 0)]
        words += ["--methods", *self.settings["steered"], "--gallery", *self.settings["galleries"]]
        words += ["--batch_size", *self.settings["steering_batches"], "--out", file]
        words += ["--profile"] if self.args.profile else []
        self.say("steering")
        try:
            done = subprocess.run(
                self.command("steering.py", *words), env=self.environment, check=False, timeout=self.left()
            )
            failed = f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            failed = "time limit"
        # It writes after each measurement.
        self.results["steering"] = json.loads(file.read_text()) if file.exists() else {}
        if failed:
            self.results["steering"]["failed"] = failed
        file.unlink(missing_ok=True)
        self.save()

    def strength(self) -> None:
        """The choice of a strength."""
        self.say("strength")
        images, classes = self.settings["chosen_on"]
        words = ["--device", self.device, "--images", images, "--classes", classes, "--rounds", self.args.rounds]
        self.results["strength"] = self.run("strength.py", *words)
        self.say(f"strength: {self.results['strength']}")
        self.save()

    def gallery(self) -> None:
        """Queries of a large gallery."""
        self.say("gallery")
        words = ["--device", self.device, "--count", self.settings["looked_up"], "--rounds", self.args.rounds]
        self.results["gallery"] = self.run("gallery.py", *words)
        self.say(f"gallery: {self.results['gallery']}")
        self.save()

    def extraction(self) -> None:
        """Extraction, the start of a training, and memory."""
        found = self.results.setdefault("extraction", {"memory": []})
        folder = self.scratch / "images"
        rounds = self.settings["extraction_rounds"] or self.args.rounds
        words = ["throughput", folder, "--images", self.settings["images"], "--rounds", rounds]
        words += ["--device", self.device, "--workers", self.settings["workers"]]
        self.say("extraction")
        found["throughput"] = self.run("extraction.py", *words)
        self.say(f"extraction beside the plain forward: {found['throughput']}")
        self.save()
        if not self.settings["starts"]:
            return
        starts = [
            self.run("first_step.py", folder, "--started", time.time()) for _ in range(2 + self.settings["starts"])
        ]
        # The first one extracts; the second is not counted, since the files of libraries may not have been in memory.
        found["cache_hit"] = next((start for start in starts if "failed" in start), None) or {
            "seconds": [start["from_process_start"] for start in starts[2:]],
        }
        self.say(f"cache hit up to the first training step: {found['cache_hit']}")
        self.save()
        for count in self.settings["cached"]:
            words = [
                "memory",
                self.scratch / f"small-{count}",
                "--count",
                count,
                "--samples",
                self.settings["cached_samples"],
            ]
            found["memory"].append({"count": count, **self.run("extraction.py", *words)})
            self.say(f"memory: {found['memory'][-1]}")
            self.save()


class Worker:
    """One implementation in a process of its own, which waits for its turn."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], patience: float | None
    ) -> None:
        self.name, self.patience, self.row = name, patience, {}
        self.command, self.environment = command, environment
        self.errors = tempfile.TemporaryFile("w+")
        self.process: subprocess.Popen[str] | None = None
        self.ended = ""

    def begin(self, row: dict, order: Mapping[str, object]) -> None:
        """Start it with its first training, or order the next one, whose figures go into ``row``."""
        self.row = row
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
            )
        else:
            self._order(json.dumps(order))

    def ready(self) -> bool:
        """Wait until it is warm; whether it is."""
        return self._listen("ready")

    def turn(self) -> None:
        """Let it train for a while."""
        if "failed" in self.row:
            return
        self._order("")
        if self._listen("seconds"):
            self.row["turns"].append(self.row.pop("seconds"))

    def _order(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it has ended: listening tells why
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def _listen(self, wanted: str) -> bool:
        """Wait for a fact. Without an answer in time, the process is ended."""
        timer = threading.Timer(self.patience or threading.TIMEOUT_MAX, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            for line in self.process.stdout:
                facts = json.loads(line)
                self.row |= {name: value for name, value in facts.items() if name != "ready"}
                if wanted in facts or "failed" in facts:
                    return wanted in facts
        finally:
            timer.cancel()
        self.errors.seek(0)
        self.ended = self.ended or last_line(self.errors.read(), self.process.wait())
        self.row["failed"] = self.row.get("failed") or self.ended
        return False

    def _give_up(self) -> None:
        self.ended = f"no answer in {self.patience:.0f} s"
        self.process.kill()

    def end(self) -> None:
        """End it in the middle of its training."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.errors.close()


def last_line(errors: str, code: int | str) -> str:
    """Why a process gave nothing."""
    if isinstance(code, str):
        return code
    return ([f"exit code {code}", *errors.strip().splitlines()])[-1]


def summarize(rows: Sequence[dict]) -> None:
    """Samples per second of each turn, their median and spread, and the ratio to the floor of the same shape."""
    for row in rows:
        if not row["turns"]:
            continue
        rates = [row["batch"] * len(turn) / sum(turn) for turn in row["turns"]]
        row["samples_per_second"] = statistics.median(rates)
        row["spread"] = [min(rates), max(rates)]
        row["step_seconds"] = statistics.median(step for turn in row["turns"] for step in turn)
    floors = [row for row in rows if row["implementation"].startswith("floor") and "samples_per_second" in row]
    for row in rows:
        if "samples_per_second" in row:
            for floor in floors:
                row[f"times_{floor['implementation']}"] = floor["samples_per_second"] / row["samples_per_second"]


def shape_of(row: dict) -> tuple:
    """The shape of a training."""
    return row["d"], row["n"], row["k"], row["batch"]


def brief(row: dict) -> str:
    """A row in few words."""
    return f"{row['implementation']} " + (f"{row['samples_per_second']:,.0f}/s" if row["turns"] else "-")


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(results: dict) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    libraries = machine["libraries"]
    versions = ", ".join(f"{name} {version}" for name, version in libraries["versions"].items())
    lines = [
        f"{gpu_words(results)}{machine['cpu']}, {machine['cores']} cores, {libraries['threads']} threads, "
        f"{machine['memory_gb']} GB; Python {machine['python']}, {versions}; {machine['date'][:10]}."
    ]
    if results["quick"]:
        lines += ["", "A quick run: these figures only show that all works."]
    rows = [*results.get("training", []), *results.get("shapes", [])]
    for shape in dict.fromkeys(map(shape_of, rows)):
        lines += ["", *training_table(shape, [row for row in rows if shape_of(row) == shape])]
    if "quality" in results:
        lines += ["", *quality_table(results["quality"])]
    if "results" in results.get("steering", {}):
        lines += ["", *steering_table(results["steering"])]
    if "strength" in results:
        lines += ["", *strength_lines(results["strength"])]
    if "extraction" in results:
        lines += ["", *extraction_lines(results["extraction"])]
    if "gallery" in results:
        lines += ["", *gallery_lines(results["gallery"])]
    return "\n".join(lines) + "\n"


def gpu_words(results: dict) -> str:
    """The GPU, where it was measured."""
    gpu = results["machine"]["libraries"].get("gpu")
    if results["device"] == "cpu" or gpu is None:
        return ""
    return f"{gpu['name']}, {gpu['memory_gb']} GB, CUDA {gpu['cuda']}; "


def training_table(shape: tuple, rows: Sequence[dict]) -> Iterator[str]:
    """Speed and memory at one shape. Memory is that of what was measured: the process, or the GPU."""
    d, n, k, batch = shape
    floors = [row["implementation"] for row in rows if row["implementation"].startswith("floor") and row["turns"]]
    yield f"Training, d = {d}, n = {n}, k = {k}, batch {batch}:"
    yield ""
    times = " | ".join(f"x {name} time" for name in floors) + " | " if floors else ""
    yield f"| implementation | samples/s, median [min, max] | {times}peak MB | of it before training |"
    yield "|---|---:|" + "---:|" * (len(floors) + 2)
    for row in rows:
        if row["turns"]:
            low, high = row["spread"]
            times = "".join(f"{row.get(f'times_{name}', float('nan')):.2f} | " for name in floors)
            yield (
                f"| {row['implementation']} | {row['samples_per_second']:,.0f} [{low:,.0f}, {high:,.0f}] | "
                f"{times}{row['peak_mb']:,.0f} | {row.get('imported_mb', float('nan')):,.0f} |"
            )
    yield from failures(rows)


def quality_table(rows: Sequence[dict]) -> Iterator[str]:
    """FVU and dead latents."""
    yield "Held-out FVU and dead latents, each at its own defaults (samples 0: this package's default number):"
    yield ""
    yield "| implementation | stored | samples | seed | seconds | FVU | dead % | earlier look |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|"
    for row in rows:
        if "failed" not in row:
            early = row.get("first_look")
            look = f"FVU {early['fvu']:.3f} after {early['seconds']:.0f} s" if early else ""
            yield (
                f"| {row['implementation']} | {row['count']:,} | {row['samples']:,} | {row['seed']} | "
                f"{row['seconds']:.0f} | {row['fvu']:.4f} | {100 * row['dead']:.2f} | {look} |"
            )
    yield from failures(rows)


def steering_table(found: dict) -> Iterator[str]:
    """Overhead of steering."""
    yield "Time of `encode_image` steered over plain:"
    yield ""
    yield "| method | gallery | batch | precision | ratio, median [quartiles] | plain ms | steering ms |"
    yield "|---|---:|---:|---|---:|---:|---:|"
    for row in found["results"]:
        low, high = row["quartiles"]
        gallery = f"{row['gallery']:,}" if row["gallery"] else ""
        yield (
            f"| {row['method']} | {gallery} | {row['batch_size']} | {row['precision']} | "
            f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}] | {1e3 * row['plain_s']:.2f} | {1e3 * row['more_s']:.2f} |"
        )


def strength_lines(found: dict) -> Iterator[str]:
    """The choice of a strength."""
    if "failed" in found:
        yield f"Strength: not measured ({found['failed']})."
        return
    yield f"The choice of a strength on {found['images']:,} images and {found['classes']:,} classes:"
    yield ""
    yield "| method | seconds, median [min, max] |"
    yield "|---|---:|"
    for row in found["methods"]:
        low, high = row["spread_s"]
        yield f"| {row['method']} | {row['s']:.2f} [{low:.2f}, {high:.2f}] |"


def gallery_lines(found: dict) -> Iterator[str]:
    """Queries of a large gallery."""
    if "failed" in found:
        yield f"Gallery: not measured ({found['failed']})."
        return
    yield f"Queries of {found['batch']} in a gallery of {found['count']:,} x {found['width']}:"
    yield ""
    yield "| search | ms, median [min, max] | ready after s | memory MB | recall |"
    yield "|---|---:|---:|---:|---:|"
    for row in found["searches"]:
        if "failed" in row:
            yield f"| {row['search']} | not measured: {row['failed']} | | | |"
            continue
        low, high = row["spread_ms"]
        recall = "" if row.get("recall") is None else f"{row['recall']:.3f}"
        yield (
            f"| {row['search']} | {row['ms']:.2f} [{low:.2f}, {high:.2f}] | {row['ready_s']:.1f} | "
            f"{row['memory_mb']:,.0f} | {recall} |"
        )


def extraction_lines(found: dict) -> Iterator[str]:
    """Extraction, cache hit and memory."""
    through, start = found.get("throughput", {}), found.get("cache_hit", {})
    if "extraction_over_plain" in through:
        extraction, plain, loop = (
            statistics.median(through[f"{name}_images_per_second"]) for name in ("extraction", "plain", "plain_loop")
        )
        ratios = {
            name: "{:.3f} [{:.3f}, {:.3f}]".format(
                through[f"extraction_over_{name}"], *through[f"extraction_over_{name}_spread"]
            )
            for name in ("plain", "plain_loop")
        }
        yield (
            f"- Extraction: {extraction:.1f} images/s; the plain forward in a loop over torch's DataLoader "
            f"{loop:.1f} (ratio {ratios['plain_loop']}), on batches in memory {plain:.1f} (ratio {ratios['plain']}), "
            f"loading alone {through['loading_images_per_second']:.1f}"
        )
        yield (
            f"- Processor time per image: loading {through['loading_processor_ms']:.2f} ms, of it decoding and "
            f"resizing {through['decoding_processor_ms']:.2f} ms; forward {through['forward_processor_ms']:.2f} ms. "
            f"Where the forward takes all cores, {through['possible_with_this_loading']:.3f} of its rate in memory is "
            f"possible, {through['possible_with_decoding_alone']:.3f} if decoding and resizing were all"
        )
    if "seconds" in start:
        seconds = start["seconds"]
        yield (
            f"- Cache hit: {statistics.median(seconds):.2f} s [{min(seconds):.2f}, {max(seconds):.2f}] from the start "
            "of the process to the first training step"
        )
    for row in found["memory"]:
        if "failed" not in row:
            yield (
                f"- Peak memory with {row['count']:,} images: {row['extraction_own_peak_mb']:,.0f} MB for extraction "
                f"with its loaders (and a product in the tower's place), {row['training_own_peak_mb']:,.0f} MB for "
                f"training; {row['peak_mb']:,.0f} MB with libraries and mapped pages"
            )
    yield from failures([row for row in found.values() if isinstance(row, dict)] + found["memory"])


def failures(rows: Sequence[dict]) -> Iterator[str]:
    """What was not measured."""
    failed = [row for row in rows if "failed" in row]
    if failed:
        yield ""
        yield "Not measured: " + "; ".join(f"{row.get('implementation', '')} ({row['failed']})" for row in failed) + "."


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS["cpu"], metavar="PART", help="of: " + " ".join(PARTS["cpu"])
    )
    parser.add_argument(
        "--limit", action="append", default=[], metavar="PART=SECONDS", help="leave out what is not measured by then"
    )
    parser.add_argument("--profile", action="store_true", help="print what steering adds, by operator and kernel")
    parser.add_argument("--seconds", type=float, help="of a turn (default: 1.2, on a GPU 0.2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each implementation (default: 5)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that all works, measures nothing")
    parser.add_argument(
        "--out", type=Path, default=Path("performance.json"), help="file or folder (default: performance.json)"
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="the interpreter of an environment that has this implementation, and this package",
    )
    parser.add_argument(
        "--implementations", nargs="+", choices=KNOWN, metavar="NAME", help="of: " + " ".join(KNOWN)
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="stored activations to train on")
    args = parser.parse_args()
    for text in args.limit:
        if text.partition("=")[0] not in PARTS["cpu"] or not text.partition("=")[2].isdigit():
            parser.error(f"--limit {text!r}: expected PART=SECONDS, PART one of {' '.join(PARTS['cpu'])}")
    for text in args.python:
        if text.partition("=")[0] not in KNOWN or not text.partition("=")[2]:
            parser.error(f"--python {text!r}: expected NAME=PATH, NAME one of {' '.join(PEERS)}")
    if args.out.is_dir():
        args.out /= "performance.json"
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}; expected one that exists")
    with tempfile.TemporaryDirectory() as scratch:
        suite = Suite(args, Path(scratch))
        if suite.device == "cuda" and suite.gpu is None:
            parser.error("--device cuda: torch finds no GPU; expected one, or --device cpu")
        suite.say(f"load before: {suite.results['machine']['load_before'][0]:.2f}; others on this machine disturb")
        for part in PARTS[suite.device]:
            if part in (args.only or PARTS[suite.device]):
                suite.measure(part)
        suite.results["seconds"] = round(time.monotonic() - suite.started, 1)
        suite.save()
    print("\n" + tables(suite.results))
    print(f"wrote {args.out} and {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
