"""What a training log of the public scripts says, whichever of their forms it has.

    seed:1337                                                   or, in a list,   seed: 42
    val_loader:shards pattern=… tokens:62021632                 or  val_tokens: 40540160
    step:7000/20000 train_loss:1.7878 train_time:591918ms …     or  4500/20000 train_loss: 2.8130 …
    Total submission size int6+zstd: 15555017 bytes
    final_int6_sliding_window_exact val_loss:1.89576235 val_bpb:1.12278022

Numbers are Decimals: how many digits were printed says how far two of them may differ.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

_SEED = re.compile(r"^\s*seed:\s*(\d{1,10})\s*$", re.MULTILINE)
_SEED_OF_NAME = re.compile(r"(?:^|[_-])(?:seed_?|s)(\d{1,10})(?=[_.-]|$)")
_TOKENS = re.compile(
    r"^(?:val_tokens: *|val_loader:[^\n]{0,500}? tokens:)(\d{1,15})\s*$", re.MULTILINE
)
_STEP = re.compile(r"^(?:step:)?(\d{1,9})/\d{1,9} (?:train|val)_loss:", re.MULTILINE)
_SCORE = re.compile(
    r"^([A-Za-z][\w +.-]{0,80}) val_loss: ?(\d{1,3}\.\d{1,17}) val_bpb: ?(\d{1,3}\.\d{1,17})\b",
    re.MULTILINE,
)
_ARTIFACT = re.compile(r"^Total submission size[^:\n]{0,60}: (\d{1,12}) bytes", re.MULTILINE)
_CODE = re.compile(r"^Code size(?: \(compressed\))?: (\d{1,12}) bytes", re.MULTILINE)
_SETTING = re.compile(r"^  (\w{1,60}): (.{0,200})$")
_BLOCK = re.compile(r"^Hyperparameters:\n((?:  \w{1,60}:.{0,500}\n)+)", re.MULTILINE)
_INLINE = re.compile(r"\b([a-z]\w{0,60}):(\S{1,200})")
# What differs between two runs of one configuration.
_OWN = re.compile(r"seed|run_id|logfile|.*(?:rank|_dir|_path|_files|is_main_process)|distributed")


@dataclass(frozen=True, slots=True)
class LoggedScore:
    """A score as a log prints it, nats per token and bits per byte."""

    label: str
    val_loss: Decimal
    val_bpb: Decimal


@dataclass(frozen=True, slots=True)
class RunLog:
    """One run's log. `scores`: of whole validations, in the order of the log, without those during
    training. `tokens`: of the validation text. None is what the log does not say."""

    name: str
    seed: int | None
    scores: tuple[LoggedScore, ...]
    settings: dict[str, str]
    steps: int | None = None
    tokens: int | None = None
    artifact_bytes: int | None = None
    code_bytes: int | None = None

    def nearest(self, val_bpb: Decimal | None) -> LoggedScore | None:
        """The score that a claim means: the last one that agrees with it, else the last."""
        if val_bpb is not None:
            for score in reversed(self.scores):
                if agree(score.val_bpb, val_bpb):
                    return score
        return self.scores[-1] if self.scores else None


def read_log(name: str, text: str) -> RunLog:
    """Read a log; what is not there stays None. A file name that says a seed counts where the log
    itself says none."""
    text = text.replace("\r\n", "\n")
    scores = [
        LoggedScore(label, Decimal(loss), Decimal(bpb)) for label, loss, bpb in _SCORE.findall(text)
    ]
    return RunLog(
        name=name,
        seed=_last(_SEED.findall(text)) if _SEED.search(text) else seed_of_name(name),
        scores=tuple(scores),
        settings=_settings(text),
        steps=_last(_STEP.findall(text)),
        tokens=_last(_TOKENS.findall(text)),
        artifact_bytes=_last(_ARTIFACT.findall(text)),
        code_bytes=_last(_CODE.findall(text)),
    )


def seed_of_name(name: str) -> int | None:
    """The seed that a log's file name says, such as train_seed42.log."""
    found = _SEED_OF_NAME.search(name.removesuffix(".log"))
    return None if found is None else int(found[1])


def _settings(text: str) -> dict[str, str]:
    """What the log says that the run was set to, without what is a run's own."""
    if block := _BLOCK.search(text):
        lines = (_SETTING.match(line) for line in block[1].splitlines())
        found = {line[1]: line[2] for line in lines if line}
    else:
        head = text[: step.start()] if (step := _STEP.search(text)) else ""
        named = (line for line in head.splitlines() if line.startswith(_SETTING_LINES))
        found = dict(_INLINE.findall("\n".join(named)))
    return {name: value for name, value in found.items() if not _OWN.fullmatch(name)}


_SETTING_LINES = ("model_params:", "tie_embeddings:", "train_batch_tokens:", "world_size:")


def _last(found: Iterable[str]) -> int | None:
    words = list(found)
    return int(words[-1]) if words else None


def half_digit(printed: Decimal) -> Decimal:
    """How far the printed number may be from what was rounded to it."""
    exponent = printed.as_tuple().exponent
    return Decimal((0, (5,), int(exponent) - 1))


def agree(one: Decimal, other: Decimal) -> bool:
    """Whether two printed numbers may be roundings of the same; of one width they are it."""
    widths = half_digit(one), half_digit(other)
    return one == other if widths[0] == widths[1] else abs(one - other) <= sum(widths)
