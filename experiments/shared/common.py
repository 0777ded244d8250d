"""What every script shares: how it starts, how it ends, and the flags that have the same name everywhere."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from absl import app, flags

from research.data import assets
from research.errors import DataError, FlagError, UserError
from research.files import left_to_another, write_text

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would announce that torch is missing: torch is not wanted
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def run(main: Callable[[], Any]) -> None:
    """Parses the flags and runs `main`. A user's error is one line on stderr and an exit status: 2 flags, 3 data, 4
    models, adapters, checkpoints, and whatever the system refuses.

    Anything else is our bug and keeps its traceback. Ctrl-C exits with 130, SIGTERM with 143; `loop.fit` saves first.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            _fail(str(error), 2)
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}: values are given as --flag=value.", 2)
        if flags.FLAGS.only_check_args:  # absl would look at it in a process's first script only
            sys.exit(0)
        return rest

    def guarded(_: list[str]) -> None:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            _keep_compiled()
            with _together():
                main()
        except UserError as error:
            _fail(str(error), error.exit_status)
        except KeyboardInterrupt:
            _fail("stopped by Ctrl-C.", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left: so do we, quietly
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            _fail(f"{where}{error.strerror or str(error) or type(error).__name__}.", 4)
        finally:
            signal.signal(signal.SIGTERM, before)

    app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Joins the processes of a training script's run, of which the first alone prints and writes."""
    if "processes" not in flags.FLAGS:
        yield
        return
    from research.train import distributed

    place = distributed.find(*flag_values("coordinator", "processes", "process_id").values())
    with distributed.run(place) as first, contextlib.ExitStack() as quiet:
        if not first:
            quiet.enter_context(left_to_another())
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
        yield


def _keep_compiled() -> None:
    """What is compiled is kept in the cache folder, unless JAX's own settings say otherwise."""
    try:
        import jax
    except ModuleNotFoundError:  # `hf_reference` runs in an environment of its own
        return
    if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is None:
        # By processor: code made for one may not run on another that shares the folder.
        try:
            kind = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags"))
        except (OSError, StopIteration):
            kind = platform.processor()
        here = hashlib.sha256(f"{platform.machine()} {kind}".encode()).hexdigest()[:12]
        jax.config.update("jax_compilation_cache_dir", str(assets.cache_dir() / "compiled" / here))


def _terminate(*_: Any) -> None:
    sys.exit(143)


def _fail(text: str, status: int) -> None:
    print("error: " + " ".join(text.split()), file=sys.stderr)
    sys.exit(status)


def model_flags(model: str) -> None:
    """--model, --untie, --dtype, --remat, --attention, --quantise."""
    flags.DEFINE_string("model", model, "Packaged name, directory of Hugging Face files, .gguf file or hub id.")
    flags.DEFINE_bool("untie", False, "Give a model whose output is its token table a projection of its own.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype; parameters stay fp32.")
    flags.DEFINE_enum("remat", "none", ["none", "full", "dots"], "What the backward pass recomputes.")
    flags.DEFINE_enum(
        "attention",
        "xla",
        ["xla", "cudnn", "splash"],
        "Its implementation: cudnn on a GPU in bfloat16, splash on a TPU.",
    )
    flags.DEFINE_enum("quantise", None, ["int8", "nf4"], "Keep the layers' frozen kernels in so many bits (QLoRA).")


def model_options() -> dict[str, Any]:
    """How a model that those flags name is to be computed. FlagError for an attention that is for other devices."""
    import jax

    wanted = {"cudnn": "gpu", "splash": "tpu"}.get(flags.FLAGS.attention)
    if wanted not in (None, jax.default_backend()):
        raise FlagError(
            f"--attention={flags.FLAGS.attention} is for a {wanted.upper()}, and this is a "
            f"{jax.default_backend().upper()}. Valid: xla."
        )
    return flag_values("dtype", "remat", "untie", "attention")


def flag_values(*names: str) -> dict[str, Any]:
    """The values of the named flags."""
    return {name: flags.FLAGS[name].value for name in names}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; what JSON has no number for becomes null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def finite(value: Any) -> Any:
    """JSON values with None for NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, **keys: Any) -> dict[str, Any]:
    """Reads a JSON object in which each of `keys` has a value of its type. Raises DataError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: it holds {json.dumps(found)[:40]}, not an object.")
    check_keys(found, keys, path)
    return found


def check_keys(found: dict[str, Any], keys: dict[str, Any], where: str | Path) -> None:
    """DataError where a value is missing or not of its type."""
    if bad := [key for key, kind in keys.items() if not isinstance(found.get(key), kind)]:
        raise DataError(f"{where} is damaged: it has no valid {', '.join(map(repr, bad))}.")


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two nested dicts: "steps=300, not 60; data=1fd52bdfa359, not a390b801f828"."""

    def flat(value: dict[str, Any]) -> dict[str, Any]:
        return {k: v for key, x in value.items() for k, v in (flat(x) if isinstance(x, dict) else {key: x}).items()}

    def short(value: Any) -> str:
        return value[:12] if isinstance(value, str) and len(value) > 60 else str(value)  # a fingerprint

    found, wanted = flat(found), flat(wanted)
    names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name}={short(found.get(name))}, not {short(wanted.get(name))}" for name in names)


def refuse_other(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """FlagError naming the settings in which `what`, made before, differs from what is asked for."""
    if found != wanted:
        raise FlagError(f"{what} with {differences(found, wanted)}: give another --workdir.")


def environment() -> dict[str, Any]:
    """Versions, machine and revision: what a number was measured on."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    import jax

    try:
        here = Path(__file__).parent
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:  # there is no git
        git = ""
    return {
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in PACKAGES},
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "revision": git or None,
    }


def write_config(workdir: Path) -> None:
    """Writes config.json: every flag of the script, the command line and the environment. Call it under the lock, and
    only when nothing in the folder speaks against the run: an earlier run's config.json stays true to its results.
    """
    own = flags.FLAGS.flags_by_module_dict()
    modules = [sys.argv[0], *(name for name in own if name.startswith("experiments."))]
    values = {f.name: f.value for module in modules for f in own.get(module, [])}
    write_json(workdir / "config.json", {"command": ["python", "-m", *_command()], "flags": values} | environment())


def _command() -> list[str]:
    name = getattr(sys.modules["__main__"], "__spec__", None)
    return [name.name if name else sys.argv[0], *sys.argv[1:]]


def jsonable(config: Any) -> dict[str, Any]:
    """A frozen dataclass as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
