"""Measure this package on your machine, beside other SAE libraries and the floor of the hardware.

    python benchmark_configs/performance/run.py [--only training shapes quality steering extraction]
        [--rounds 5] [--quick] [--out performance.json] [--python NAME=PATH ...]

What is measured, and how, is in the README.md beside this file. Every figure is written to the JSON file as soon as it
is there; a Markdown file of the same name holds the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("training", "shapes", "quality", "steering", "extraction")
#: What is measured: of this machine and this package, of other libraries, at other shapes, and of FVU.
OWN = ("floor", "floor_bfloat16", "vs2", "vs2_float32", "dense", "dense_bfloat16")
PEERS = ("sparsify", "sparsify_adam", "saelens", "overcomplete", "dictionary_learning", "latentsae")
AT_OTHER_SHAPES = ("floor", "floor_bfloat16", "vs2", "dense", "sparsify")
AT_DEFAULTS = ("sparsify", "saelens", "overcomplete", "dictionary_learning", "latentsae")
PACKAGES = (
    "torch open_clip_torch numpy vs2-plugin eai-sparsify sae-lens overcomplete dictionary-learning latentsae"
).split()

#: Name -> the value of a full run, and of a quick one, which only shows that all works.
SETTINGS = {
    "shape": ((768, 3072, 64), (64, 256, 8)),
    "other_shapes": ([(768, 3072, 256), (1024, 10240, 128)], [(64, 256, 16)]),
    "batch": (4096, 256),
    "steps": (20, 3),
    "seconds": (1.2, 0.5),
    "stored": (100_000, 5_000),
    "samples": (500_000, 10_000),
    "seeds": ([0, 1, 2], [0]),
    "sizes": ([900, 6_000, 50_000, 1_000_000], [900]),
    "images": (1024, 64),
    "starts": (7, 1),
    "cached": ([20_000, 1_000_000], [2_000, 20_000]),
    "cached_samples": (100_000, 2_000),
    "steered": (["vs2", "vs2pp"], ["vs2"]),
    "gallery": (50_000, 1_000),
    "steering_batch": (64, 2),
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
print(json.dumps({"threads": torch.get_num_threads(), "versions": found, "build": torch.__config__.show()}))
"""


class Suite:
    """The measurements, and where they go."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.settings = {name: values[args.quick] for name, values in SETTINGS.items()}
        self.settings["sizes"] = args.sizes or self.settings["sizes"]
        self.pythons = dict(text.split("=", 1) for text in args.python)
        self.environment = {
            # For all alike: threads sleep while they wait, so that those whose turn it is not take no time. No GPU.
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            "SPARSIFY_DISABLE_TRITON": "1",
            "WANDB_MODE": "disabled",
            **os.environ,
            "TMPDIR": str(scratch),  # what a process leaves behind goes with all else
        }
        self.started = time.monotonic()
        self.results: dict = {"machine": self._machine(), "quick": args.quick, "settings": self.settings}

    def say(self, *words: object) -> None:
        """Tell how far it is."""
        print(f"[{time.monotonic() - self.started:5.0f} s]", *words, flush=True)

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
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {"failed": last_line(done.stderr, done.returncode)}

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
        """Training speed of all."""
        self._turns("training", self.settings["shape"], [*OWN, *PEERS], self.args.rounds)

    def shapes(self) -> None:
        """Training speed at other shapes."""
        for shape in self.settings["other_shapes"]:
            self._turns("shapes", shape, AT_OTHER_SHAPES, max(1, min(3, self.args.rounds)))

    def _turns(self, part: str, shape: Sequence[int], names: Sequence[str], rounds: int) -> None:
        names = [name for name in names if self.args.implementations is None or name in self.args.implementations]
        rows = self.results.setdefault(part, [])
        facts = dict(zip("dnk", shape, strict=True)) | {"batch": self.settings["batch"]}
        words = [word for name, value in facts.items() for word in (f"--{name}", value)]
        words += ["--steps", self.settings["steps"], "--seconds", self.settings["seconds"]]
        words += ["--activations", self.activations(shape[0]), "--turns"]
        with contextlib.ExitStack() as stack:
            workers = []
            for name in names:
                row = {"implementation": name, **facts, "turns": []}
                rows.append(row)
                worker = Worker(self.command("training.py", *words, implementation=name), self.environment, row)
                stack.callback(worker.end)
                if worker.start():
                    workers.append(worker)
                self.say(f"{name} at {shape}:", "ready" if worker in workers else f"not measured, {row['failed']}")
                self.save()
            for number in range(rounds):
                for worker in workers if number % 2 == 0 else reversed(workers):
                    worker.turn()
                    summarize(rows)
                    self.save()
                self.say(f"round {number + 1} of {rounds}: " + ", ".join(map(brief, rows[-len(names) :])))

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
        file = self.scratch / "steering.json"
        words = ["--rounds", self.args.rounds, "--methods", *self.settings["steered"], "--out", file]
        words += ["--gallery", self.settings["gallery"], "--batch_size", self.settings["steering_batch"]]
        self.say("steering")
        done = subprocess.run(self.command("steering.py", *words), env=self.environment, check=False)
        found = json.loads(file.read_text()) if done.returncode == 0 else {"failed": f"exit code {done.returncode}"}
        self.results["steering"] = found
        self.save()

    def extraction(self) -> None:
        """Extraction, the start of a training, and memory."""
        found = self.results.setdefault("extraction", {"memory": []})
        folder = self.scratch / "images"
        words = ["throughput", folder, "--images", self.settings["images"], "--rounds", self.args.rounds]
        self.say("extraction")
        found["throughput"] = self.run("extraction.py", *words)
        self.say(f"extraction beside the plain forward: {found['throughput']}")
        self.save()
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

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], row: dict) -> None:
        self.row = row
        self.errors = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
        )

    def start(self) -> bool:
        """Wait until it is ready; whether it is."""
        return self._listen("ready")

    def turn(self) -> None:
        """Let it train for a while."""
        if "failed" in self.row:
            return
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if self._listen("seconds"):
            self.row["turns"].append(self.row.pop("seconds"))

    def _listen(self, wanted: str) -> bool:
        for line in self.process.stdout:
            facts = json.loads(line)
            self.row |= {name: value for name, value in facts.items() if name != "ready"}
            if wanted in facts or "failed" in facts:
                return wanted in facts
        self.errors.seek(0)
        self.row["failed"] = last_line(self.errors.read(), self.process.wait())
        return False

    def end(self) -> None:
        """End it in the middle of its training."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def last_line(errors: str, code: int) -> str:
    """Why a process gave nothing."""
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
    floors = {shape_of(row): row.get("samples_per_second") for row in rows if row["implementation"] == "floor"}
    for row in rows:
        if floors.get(shape_of(row)) and "samples_per_second" in row:
            row["times_floor"] = floors[shape_of(row)] / row["samples_per_second"]


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
        f"{machine['cpu']}, {machine['cores']} cores, {libraries['threads']} threads, {machine['memory_gb']} GB; "
        f"Python {machine['python']}, {versions}; {machine['date'][:10]}."
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
    if "extraction" in results:
        lines += ["", *extraction_lines(results["extraction"])]
    return "\n".join(lines) + "\n"


def training_table(shape: tuple, rows: Sequence[dict]) -> Iterator[str]:
    """Speed and memory at one shape."""
    d, n, k, batch = shape
    yield f"Training, d = {d}, n = {n}, k = {k}, batch {batch}:"
    yield ""
    yield "| implementation | samples/s, median [min, max] | x floor time | peak MB | of it before training |"
    yield "|---|---:|---:|---:|---:|"
    for row in rows:
        if row["turns"]:
            low, high = row["spread"]
            yield (
                f"| {row['implementation']} | {row['samples_per_second']:,.0f} [{low:,.0f}, {high:,.0f}] | "
                f"{row.get('times_floor', float('nan')):.2f} | {row['peak_mb']:,.0f} | {row['imported_mb']:,.0f} |"
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
    yield f"Time of `encode_image` steered over plain, batch {found['batch_size']}, gallery of {found['gallery']:,}:"
    yield ""
    yield "| method | autocast | ratio, median [quartiles] | plain s |"
    yield "|---|---|---:|---:|"
    for row in found["results"]:
        low, high = row["quartiles"]
        yield (
            f"| {row['method']} | {'yes' if row['amp'] else 'no'} | {row['ratio']:.3f} [{low:.3f}, {high:.3f}] | "
            f"{row['plain_s']:.3f} |"
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
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="of: " + " ".join(PARTS)
    )
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
        "--implementations", nargs="+", choices=[*OWN, *PEERS], metavar="NAME", help="of: " + " ".join([*OWN, *PEERS])
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="stored activations to train on")
    args = parser.parse_args()
    for text in args.python:
        if text.partition("=")[0] not in PEERS or not text.partition("=")[2]:
            parser.error(f"--python {text!r}: expected NAME=PATH, NAME one of {' '.join(PEERS)}")
    if args.out.is_dir():
        args.out /= "performance.json"
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}; expected one that exists")
    with tempfile.TemporaryDirectory() as scratch:
        suite = Suite(args, Path(scratch))
        suite.say(f"load before: {suite.results['machine']['load_before'][0]:.2f}; others on this machine disturb")
        for part in PARTS:
            if part in args.only:
                getattr(suite, part)()
        suite.results["seconds"] = round(time.monotonic() - suite.started, 1)
        suite.save()
    print("\n" + tables(suite.results))
    print(f"wrote {args.out} and {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
