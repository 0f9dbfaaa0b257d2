"""The whole recipe, one command:  python -m models.training.run --data .data --out out/training

It starts one process a GPU, and every stage saves its progress and resumes. --stage takes one stage or several with
commas between them, so that stages that need not wait for one another can each have some GPUs (CUDA_VISIBLE_DEVICES).
--miniature does it all on the CPU in minutes, on drawn shapes; --smoke runs every stage at full size for seconds;
--rehearse runs a smoke beside the real run, so that later stages' faults show while the VAE still trains and their
graphs are compiled before they are needed. Two stages are not part of "all": carry collects what a machine without a
network needs, publish puts a finished run's networks and figures into a bundle of this repository.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

from models.errors import ModelError
from models.training.compiled import AWAIT_MARKERS, LEAVE_MARKERS, OVER
from models.training.distributed import join, leave
from models.training.settings import FULL, MINIATURE, Budgets

STAGES = (
    "sprites", "vae", "scorer", "reference", "teacher", "lcm", "lcm-lora", "consistency", "consistency-training",
    "sheets", "pack",
)  # fmt: skip
TIMED = tuple(field.name for field in fields(Budgets))
ALONE = ("carry", "publish")
BUNDLE = Path("models/bundles/headstart-v2")
_FULL_SECONDS = Budgets(
    vae=220, scorer=170, teacher=700, lcm=180, lcm_lora=80, consistency=150, consistency_training=90
)
_SMOKE_SECONDS = Budgets(**dict.fromkeys(TIMED, 5.0))
_MINIATURE_SECONDS = Budgets(vae=8, scorer=3, teacher=8, lcm=3, lcm_lora=2, consistency=3, consistency_training=2)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", default="all", type=_stages, metavar="STAGE[,STAGE]", help=f"{', '.join((*STAGES, *ALONE))}; all"
    )
    parser.add_argument("--data", type=Path, default=Path(".data"), help="sprites, text tower and their sources")
    parser.add_argument("--out", type=Path, default=Path("out/training"))
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="the bundle that publish writes")
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0 means one a GPU, or one without GPUs")
    for stage in TIMED:
        name = stage.replace("_", "-")
        parser.add_argument(f"--{name}-seconds", type=float, help=f"training time of the stage {name}")
    parser.add_argument("--start-from", type=Path, help="folder with an earlier unet/ and vae/ to go on from")
    parser.add_argument("--given", type=Path, help="bundle whose vae/ and scorer/ are taken instead of trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--miniature", action="store_true", help="tiny sizes on drawn shapes, for the CPU")
    parser.add_argument("--smoke", action="store_true", help="seconds a stage, full sizes")
    parser.add_argument("--rehearse", action="store_true", help="run a smoke beside the real run, on the last GPU")
    parser.add_argument(
        "--batch-of", type=int, default=1, help="train with one rank's share of a run of this many ranks"
    )
    return parser.parse_args(arguments)


def _stages(text: str) -> tuple[str, ...]:
    names = STAGES if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in (*STAGES, *ALONE) or (name in ALONE and len(names) > 1):
            raise argparse.ArgumentTypeError(
                f"'{name}' is not allowed; {', '.join(STAGES)}, or alone {', '.join(ALONE)}"
            )
    return names


def budgets(args: argparse.Namespace) -> Budgets:
    """Seconds a stage: the preset's, unless given."""
    usual = _MINIATURE_SECONDS if args.miniature else _SMOKE_SECONDS if args.smoke else _FULL_SECONDS
    given = {name: getattr(args, f"{name}_seconds") for name in TIMED}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})


def work(args: argparse.Namespace) -> None:
    """One rank's whole run."""
    from diffusers.utils import logging  # heavy imports, needed by workers only

    from models.training.pipeline import Run

    logging.set_verbosity_error()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # tiny kernels; more threads mostly wait for each other

    ranks = join(float(os.environ.get("STARTED", time.time())))
    preset = replace(MINIATURE if args.miniature else FULL, seed=args.seed).for_one_of(args.batch_of)
    try:
        run = Run(preset, budgets(args), args.data, args.out, ranks, args.start_from, args.given)
        for stage in args.stage:
            run.stage(stage)
        ranks.log("end")
    finally:
        leave()


def _start(arguments: list[str], environment: dict[str, str], log: Path | None = None) -> subprocess.Popen[bytes]:
    """One process of this program."""
    command = [sys.executable, "-m", "models.training.run", *arguments]
    if log is None:
        return subprocess.Popen(command, env=environment)
    with log.open("wb") as sink:
        return subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)


def _gpu(rank: int) -> str:
    """The GPU of a rank, among those that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[rank] if given else str(rank)


def _rehearsal(args: argparse.Namespace, ranks: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A smoke on the last GPU, in its own folder, with one rank's batch; it marks the graphs it has compiled."""
    folder, markers = args.out / "rehearsal", Path(environment[AWAIT_MARKERS])
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--smoke", "--ranks", "1", "--batch-of", str(ranks), "--data", str(args.data), "--out", str(folder)]
    arguments += ["--miniature"] if args.miniature else []
    arguments += ["--start-from", str(args.start_from)] if args.start_from else []
    arguments += ["--given", str(args.given)] if args.given else []
    own = {key: value for key, value in environment.items() if key != AWAIT_MARKERS}
    own |= {LEAVE_MARKERS: str(markers), "RANK": "0", "RANKS": "1", "CUDA_VISIBLE_DEVICES": _gpu(ranks - 1)}
    return _start(arguments, own, folder / "log.txt")


def launch(args: argparse.Namespace, ranks: int) -> int:
    """Start every rank, wait; if one fails, end the others. Returns the exit status."""
    args.out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, STARTED=str(time.time()), PYTHONUNBUFFERED="1")
    environment.setdefault("NCCL_NVLS_ENABLE", "0")
    environment.setdefault("OMP_NUM_THREADS", "4" if torch.cuda.is_available() else "1")
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "headstart-inductor"))
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    with tempfile.TemporaryDirectory() as scratch:
        rehearsal = None
        if args.rehearse:
            environment[AWAIT_MARKERS] = str(Path(scratch) / "markers")
            Path(environment[AWAIT_MARKERS]).mkdir()
            rehearsal = _rehearsal(args, ranks, environment)
        workers = []
        for rank in range(ranks):
            own = environment | {"RANK": str(rank), "RANKS": str(ranks), "RENDEZVOUS": str(Path(scratch) / "store")}
            if torch.cuda.is_available():
                own["CUDA_VISIBLE_DEVICES"] = _gpu(rank)
            workers.append(_start(sys.argv[1:], own))
        status = _wait(workers, rehearsal, environment)
        if rehearsal is not None and rehearsal.poll() is None:
            rehearsal.terminate()
            rehearsal.wait()
        return status


def _wait(
    workers: list[subprocess.Popen[bytes]], rehearsal: subprocess.Popen[bytes] | None, environment: dict[str, str]
) -> int:
    """Exit status of the workers; reports how the rehearsal ended."""
    while True:
        codes = [worker.poll() for worker in workers]
        if rehearsal is not None and rehearsal.poll() is not None:
            marker = Path(environment[AWAIT_MARKERS]) / OVER
            if not marker.exists():
                marker.touch()
                verdict = (
                    "passed" if rehearsal.returncode == 0 else f"FAILED with {rehearsal.returncode}: see its log.txt"
                )
                print(f"[{time.time() - float(environment['STARTED']):7.1f}s] rehearsal {verdict}", flush=True)
        if all(code is not None for code in codes):
            return max(abs(code or 0) for code in codes)
        if any(code not in (None, 0) for code in codes):
            time.sleep(5)
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
            return 1
        time.sleep(0.3)


def main() -> int:
    try:
        return run(parse())
    except ModelError as error:  # the caller can mend it
        print(f"models.training.run: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """What was asked for, in this process or in one a rank. Returns the exit status; raises ModelError."""
    if args.stage == ("carry",):
        from models.training.carry import make_carry

        make_carry(args.data)
        return 0
    if args.stage == ("publish",):
        from models.training.export import publish

        publish(args.out, args.bundle)
        return 0
    if "RANK" in os.environ:
        work(args)
        return 0
    ranks = args.ranks or max(1, torch.cuda.device_count())
    if ranks == 1 and not args.rehearse:
        work(args)
        return 0
    return launch(args, ranks)


if __name__ == "__main__":
    sys.exit(main())
