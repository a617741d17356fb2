"""Finals of one bank outside a sweep: the work of `fairway quantize` and `fairway fit`."""

import hashlib
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from service import banks
from service.banks import Bank, Wanted, hessians_for, open_bank, training_text
from service.identity import fit_digest
from service.paths import Paths, is_taken
from service.rescore import Asked, rescore
from service.scored_text import Source, text_of
from service.talk import Talk
from trainer.choosing import PROBE_TOKENS, probe_on
from trainer.codec import dump, fingerprint, parse_assignment, to_yaml
from trainer.data.shards import TokenStream
from trainer.errors import UsageError
from trainer.finalize.code import code_digest
from trainer.finalize.fit import Subject, fit
from trainer.finalize.pipeline import FinalReport, finalize
from trainer.protocol import SPEC_VERSION
from trainer.rows import typical_deviations
from trainer.runtime.distributed import current
from trainer.runtime.files import read_json, sha256_file, write_json, write_text
from trainer.sizes import forecast_interval
from trainer.specs.final import FinalSpec

# What fit chooses itself: to set it would be passed over in silence.
_CHOSEN: Final = ("bits", "clip", "clips", "clip_scope", "scale_floor", "int8")
_KEPT: Final = {
    "final.prune": "prune",
    "final.compress": "compress",
    "final.code": "code",
    "final.quantize.float_numel": "float_numel",
}


def quantize_bank(paths: Paths, wanted: Wanted, out: Path) -> dict[str, Any]:
    """Finalize a bank entry into a new folder; return what was written, tensor by tensor."""
    require_new(out)
    bank = open_bank(paths, wanted)
    hessians = hessians_for(paths, bank, wanted)
    with _whole(out) as folder:
        artifact = folder / "artifact"
        report = finalize(
            bank.on_device(), bank.model, bank.final, artifact, bank.tokenizer_sha256, hessians
        )
        document = _document(bank, bank.final, report)
        _describe(folder, bank.final, report, document)
    return {"artifact": str(out / "artifact"), **document, "tensors": dump(report.tensors)}


def fit_bank(
    paths: Paths, wanted: Wanted, cap_bytes: int, source: Source, asked: Asked, out: Path | None
) -> dict[str, Any]:
    """Fit a bank entry to a cap, or find it fitted, and score the artifact that was written.

    It stays in the home; `out` is a new folder for a copy.
    """
    if out is not None:
        require_new(out)
    _require_apart(wanted.train_tokens, source.tokens)
    bank = open_bank(paths, wanted)
    if source.tokens is not None:
        text_of(paths, source)  # before minutes are spent: what is wrong with it is said now
    folder = _fitted(paths, bank, wanted, cap_bytes)
    if out is not None:
        shutil.copytree(folder, out, dirs_exist_ok=True)
    artifact = (out or folder) / "artifact"
    score = _score(paths, bank, artifact, source, asked)
    return {"artifact": str(artifact), **score, **read_json(folder / "result.json")}


def _require_apart(chosen_on: Path | None, scored: Path | None) -> None:
    """Refuse to choose on the text that is scored (techniques 1.9)."""
    if chosen_on is None or scored is None or not (chosen_on.is_file() and scored.is_file()):
        return
    if sha256_file(chosen_on) == sha256_file(scored):
        raise UsageError("--train-tokens: the same text as --tokens; what is scored must be unseen")


def _score(
    paths: Paths, bank: Bank, artifact: Path, source: Source, asked: Asked
) -> dict[str, Any]:
    """Score an artifact as `fairway score` does; without a text, say why there is no score."""
    if source.data is None and source.tokens is None:
        if bank.dataset is None:
            reason = "the import names no text; give --tokens with --tokenizer"
            return {"val_bpb": None, "val_reason": reason}
        source = replace(source, data=bank.dataset.folder.name)
    values = {"window": bank.window, **dict(asked.evaluate)}
    score = rescore(paths, str(artifact), source, replace(asked, evaluate=tuple(values.items())))
    return {**{name: score[name] for name in ("val_bpb", "val_loss", "tokens", "bytes")}, **values}


def _fitted(paths: Paths, bank: Bank, wanted: Wanted, cap_bytes: int) -> Path:
    """Return the folder of the fit: artifact/, tensors.json, final.yaml and result.json."""
    keep = _kept(wanted.overrides)
    stream = training_text(bank, wanted, held_out=True)
    probe = None if stream is None else probe_on(bank.built(), stream, bank.window, current())
    talk = Talk()
    key = fingerprint(
        {
            "kind": "fit",
            "spec_version": SPEC_VERSION,
            "code": code_digest(),
            "search": _search_digest(),
            "bank": sha256_file(bank.file),
            "model": dump(bank.model),
            "window": bank.window,
            "final": dump(bank.final),
            "keep": sorted(keep),
            "cap_bytes": cap_bytes,
            "tokenizer": bank.tokenizer_sha256,
            "text": None if stream is None else _digest(stream),
            "calibration": _calibration(bank, wanted),
            "dtype": bank.dtype,
            "device": current().device.type,
        }
    )
    folder = paths.home / "fits" / key[:20]
    if (folder / "result.json").is_file():
        talk.say("found", fit=folder)
        return folder
    hessians = hessians_for(paths, bank, wanted)
    subject = Subject(bank.on_device(), bank.model, bank.tokenizer_sha256, hessians)
    with _whole(folder) as made:
        fitted = fit(subject, bank.final, cap_bytes, made / "artifact", probe, keep, talk.say)
        document = _document(bank, fitted.final, fitted.report)
        headroom = cap_bytes - document["artifact_bytes"]
        document |= {"cap_bytes": cap_bytes, "headroom_bytes": headroom}
        document |= {"choices": fitted.choices}
        _describe(made, fitted.final, fitted.report, document)
    return folder


def _kept(overrides: tuple[str, ...]) -> frozenset[str]:
    """What of the final is the user's word; UsageError for what fit would pass over."""
    kept: set[str] = set()
    for path in (leaf for text in overrides for leaf in _leaves(*parse_assignment(text))):
        chosen = [name for name in _CHOSEN if f"{path}.".startswith(f"final.quantize.{name}.")]
        if chosen or path.startswith("final.trim_ones"):
            raise UsageError(f"-S {path}: fit chooses it; leave it out, or use `fairway quantize`")
        kept |= {name for part, name in _KEPT.items() if f"{path}.".startswith(f"{part}.")}
    return frozenset(kept)


def _leaves(path: str, value: Any) -> list[str]:
    """The paths that an override sets: a mapping sets what is in it."""
    if not isinstance(value, Mapping) or not value:
        return [path]
    return [leaf for key, part in value.items() for leaf in _leaves(f"{path}.{key}", part)]


def _search_digest() -> str:
    """Hash the code that chooses, and that finds the text to choose on."""
    return fingerprint([fit_digest(), sha256_file(Path(str(banks.__file__)))])


def _calibration(bank: Bank, wanted: Wanted) -> str | None:
    """The whole text that Hessians read, where they read training text."""
    gptq = bank.final.quantize.gptq
    if gptq is None or gptq.calibration != "train":
        return None
    if wanted.train_tokens is not None:
        return sha256_file(wanted.train_tokens)
    return None if bank.dataset is None else bank.dataset.digest


def _digest(stream: TokenStream) -> str:
    """The head of a text, which is all that the probe reads, and its length."""
    head = stream.read(0, min(PROBE_TOKENS + 1, len(stream)))
    return fingerprint([len(stream), hashlib.sha256(head.astype("<u2").tobytes()).hexdigest()])


def _document(bank: Bank, final: FinalSpec, report: FinalReport) -> dict[str, Any]:
    forecast = forecast_interval(bank.model, final, typical_deviations(bank.state))
    return {
        "bank": bank.where,
        "entry": bank.entry,
        "artifact_bytes": report.artifact_bytes,
        "weights_bytes": report.weights_bytes,
        "code_bytes": report.code_bytes,
        "forecast_weights_bytes": dump(forecast),
        "num_pruned": report.num_pruned,
        "num_trimmed": report.num_trimmed,
        "weights_sha256": report.weights_sha256,
        "clock_s": report.clock_s,
    }


def _describe(
    folder: Path, final: FinalSpec, report: FinalReport, document: dict[str, Any]
) -> None:
    write_json(folder / "tensors.json", dump(report.tensors))
    write_text(folder / "final.yaml", to_yaml({"final": dump(final)}))
    write_json(folder / "result.json", document)


def require_new(out: Path) -> None:
    """UsageError unless a folder is absent or empty."""
    if is_taken(out):
        raise UsageError(f"{out}: holds something already; name a new folder with --out")


@contextmanager
def _whole(folder: Path) -> Generator[Path]:
    """A folder to write in, that takes its place when all of it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        made = Path(place) / folder.name
        made.mkdir()
        yield made
        try:
            made.replace(folder)
        except OSError:  # another process made the same meanwhile
            if not (folder / "result.json").is_file():
                raise
